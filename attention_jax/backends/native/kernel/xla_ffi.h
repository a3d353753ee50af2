// The declarations that we need of XLA's stable C interface for custom calls.
//
// Names and layouts follow xla/ffi/api/c_api.h, version 0.3, so that the build needs neither jaxlib
// nor XLA's headers. Newer versions only append fields. XLA asks every handler for the version that
// it was compiled for (see `answer_metadata_query` in frame.h) and rejects unsupported ones.
#pragma once
#include <cstddef>
#include <cstdint>

namespace ffi {

constexpr int API_MAJOR = 0, API_MINOR = 3;

struct Error;
struct Context;

struct Extension {
  size_t size;
  int type;
  Extension* next;
};
constexpr int METADATA_EXTENSION = 1;

struct Version {
  size_t size;
  Extension* extension;
  int major, minor;
};

struct Metadata {
  size_t size;
  Version version;
  uint32_t traits;
};

struct MetadataExtension {
  Extension base;
  Metadata* metadata;
};

enum Code : int { INVALID_ARGUMENT = 3, RESOURCE_EXHAUSTED = 8, INTERNAL = 13 };

struct ErrorCreate {
  size_t size;
  Extension* extension;
  const char* message;
  Code code;
};

struct ErrorDestroy {
  size_t size;
  Extension* extension;
  Error* error;
};

struct ThreadPoolSchedule {
  size_t size;
  Extension* extension;
  Context* context;
  void (*task)(void*);
  void* data;
};

struct ThreadPoolNumThreads {
  size_t size;
  Extension* extension;
  Context* context;
  int64_t* count;  // out
};

enum DataType : int { S32 = 4, S64 = 5, U32 = 8, F16 = 10, F32 = 11, BF16 = 16 };

struct Buffer {
  size_t size;
  Extension* extension;
  DataType dtype;
  void* data;
  int64_t rank;
  int64_t* dims;
};

struct Array {  // an attribute
  DataType dtype;
  size_t size;
  void* data;
};

struct Span {
  const char* text;
  size_t length;
};

constexpr int BUFFER = 1, ARRAY_ATTRIBUTE = 1, EXECUTE = 3;

struct Buffers {  // arguments, or results
  size_t size;
  Extension* extension;
  int64_t count;
  int* types;
  void** buffers;
};

struct Attributes {
  size_t size;
  Extension* extension;
  int64_t count;
  int* types;
  Span** names;  // in alphabetical order
  void** values;
};

struct Api {
  size_t size;
  Extension* extension;
  Version version;
  const void* internal;
  Error* (*error_create)(ErrorCreate*);
  void* error_get_message;
  void (*error_destroy)(ErrorDestroy*);
  void* handler_register;
  void* stream_get;
  void* type_register;
  void* context_get;
  void* state_set;
  void* state_get;
  void* memory_allocate;
  void* memory_free;
  Error* (*thread_pool_schedule)(ThreadPoolSchedule*);
  Error* (*thread_pool_num_threads)(ThreadPoolNumThreads*);
};

struct CallFrame {
  size_t size;
  Extension* extension;
  const Api* api;
  Context* context;
  int stage;
  Buffers arguments, results;
  Attributes attributes;
};

}  // namespace ffi

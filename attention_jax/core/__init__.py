"""What everything else is built on: axes and checks, pytrees, closures, softmax, dropout."""

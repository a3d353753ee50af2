"""What is raised when there is no data to work on."""


class DataError(OSError):
    """A data file is missing or wrong, or could not be downloaded.

    An OSError, since no argument is wrong: the disk or the network lacks the file.
    """

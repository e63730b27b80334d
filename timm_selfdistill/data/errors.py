"""What is raised for samples that cannot be used, in this process or in a loader process."""


class SampleError(ValueError):
    """A sample, or what follows in a stream, that cannot be used; the message says which.

    Args:
        message: What is wrong. From a loader process, torch hands on the whole traceback, of which the message is the
            end.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{__name__}.{type(self).__qualname__}: ")[2].rstrip())

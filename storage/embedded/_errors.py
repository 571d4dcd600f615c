"""The errors of the embedded servers."""


class EmbeddedServerError(Exception):
    """An embedded server cannot do what was asked."""


class DataDirectoryInUseError(EmbeddedServerError):
    """A living server holds the data directory."""


class PortTakenError(EmbeddedServerError):
    """Another process listens on the port."""


class BinaryUnavailableError(EmbeddedServerError):
    """No server binary was found that runs on this machine."""

"""The one version of the distribution, of its three packages and of the change log."""

__version__ = "0.1.0"

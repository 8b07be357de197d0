"""The version, as the installed distribution has it: pyproject.toml is the one place to set it."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("wsgi_dbsession")
except PackageNotFoundError:  # a copy inside of another project
    __version__ = "unknown"

"""The version of this package, also where it runs from a checkout that was not installed."""

VERSION = "0.1.0"

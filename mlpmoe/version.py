"""The version of this package: one place, which imports nothing."""

VERSION = "0.1.0"

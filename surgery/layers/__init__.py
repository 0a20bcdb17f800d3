"""Modules that edited models hold."""

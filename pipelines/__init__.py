"""The bridge: the only part of vcache that knows videos, stores and heads at once."""

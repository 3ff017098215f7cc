"""Settings for every test."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("infermesh", deadline=None)  # no test asserts on wall time: the machine may be busy
settings.load_profile("infermesh")

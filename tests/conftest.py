"""Settings for every test."""

from __future__ import annotations

import signal

from hypothesis import settings

settings.register_profile("infermesh", deadline=None)  # no test asserts on wall time: the machine may be busy
settings.load_profile("infermesh")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell without job control starts what runs in the background deaf to SIGINT, and the commands under test would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)

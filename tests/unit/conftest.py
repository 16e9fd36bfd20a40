"""Settings of the tests that draw their examples."""

from __future__ import annotations

from hypothesis import settings

# a host that is shared with other work must not fail a test for the time an example takes
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

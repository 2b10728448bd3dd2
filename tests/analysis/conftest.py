"""Property tests share two cores with everything else: no deadlines, no complaints about slow draws."""

from hypothesis import HealthCheck, settings

settings.register_profile("shared", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")

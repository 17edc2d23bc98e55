# `make night`: faults in ten minutes under a real Prometheus with the rules of contrib/prometheus, a minute of which takes a second;
# exactly the right alerts must fire and end.
.PHONY: night
night: $(B)/nexus | $(TEST_DEPS)
	@$(NODE) tests/night/night.mjs --nexus $(B)/nexus $(if $(ONLY),--only '$(ONLY)')

HELP_MORE += 'make night        faults under a real Prometheus, a minute in a second: exactly the right alerts must fire; ONLY=text picks'

"""The public APIs as pure translations: body to canonical request, events to bytes, errors to bodies. No I/O."""

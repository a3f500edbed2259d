"""A server of sessions that sleep, behind the API that everybody's client speaks (the extra "serve")."""

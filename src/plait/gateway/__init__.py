"""The OpenAI-compatible HTTP gateway: ``plait serve``."""

"""What makes training on CPUs fast: native operations, a fallback in plain JAX, and memory."""

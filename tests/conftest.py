"""Two simulated CPU devices for every test; set before jax starts its backend. And fixtures."""

import jax
from postgres import postgres_server, postgres_url

__all__ = ["postgres_server", "postgres_url"]

jax.config.update("jax_num_cpu_devices", 2)

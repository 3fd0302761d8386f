"""Two simulated CPU devices for every test; set before jax starts its backend."""

import jax

jax.config.update("jax_num_cpu_devices", 2)

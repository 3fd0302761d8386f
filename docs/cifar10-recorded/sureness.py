"""How sure recorded teachers are: `python docs/cifar10-recorded/sureness.py RECORDING...`.

Of each, over a fortieth of its steps: entropy (nats) and the largest probability at T = 1, that at
T = 4, and the standard deviation of an image's logits.
"""

import sys

import numpy as np
from scipy.special import entr, softmax

from ktg_jax.recording import Recording

STEPS = range(0, 1560, 39)

for folder in sys.argv[1:]:
    recording = Recording(folder)
    logits = np.concatenate([recording.rows(step, 1)[0] for step in STEPS]).astype(np.float32)
    plain, soft = softmax(logits, axis=-1), softmax(logits / 4, axis=-1)
    print(
        f"{folder}: entropy {entr(plain).sum(-1).mean():.2f}, largest {plain.max(-1).mean():.2f}, "
        f"at T = 4 {soft.max(-1).mean():.2f}; deviation {logits.std(-1).mean():.1f}"
    )

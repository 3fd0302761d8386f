"""Parts of `experiments.ablation`: what of Knowledge Representing does what."""

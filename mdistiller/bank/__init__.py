"""The teacher's logits: computed ahead of the steps that need them, and kept."""

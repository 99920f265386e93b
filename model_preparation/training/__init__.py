"""Training: a base distilled from any Llama, and grafted checkpoints healed, both stopped and resumed anywhere."""

"""The reference models. They know the MoE layer and the config, never a rank."""

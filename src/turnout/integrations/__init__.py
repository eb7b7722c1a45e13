"""Everything that knows another library: transformers, PEFT, trainers. Loaded on first use."""

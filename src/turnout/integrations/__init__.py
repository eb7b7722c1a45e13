"""Everything that knows another library: transformers, PEFT, trainers. Imported on first use only."""

"""LoRA on the attention and on every expert of a Qwen3-MoE, with `transformers.Trainer`.

python examples/qwen3_lora.py --model path/to/Qwen3-30B-A3B --data texts.txt
python examples/qwen3_lora.py        # a tiny random model, seconds on a CPU
"""

import tiny
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import turnout
from turnout.integrations.trainer import TurnoutCallback

args = tiny.arguments(__doc__)
if args.model is None:
    model, tokenizer = tiny.qwen3_moe()
else:
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

report = turnout.patch(model)
model = get_peft_model(
    model,
    LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=turnout.lora_targets(model),
        task_type="CAUSAL_LM",
    ),
)
report.require("fused")  # or an error that names each layer that is not, and why

texts = [text + tokenizer.eos_token for text in tiny.texts(args.data)]
trainer = Trainer(
    model,
    TrainingArguments(
        output_dir=args.out,
        max_steps=args.steps,
        per_device_train_batch_size=4,
        learning_rate=args.lr,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=[tokenizer(text, truncation=True, max_length=512) for text in texts],
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    callbacks=[TurnoutCallback()],  # kernels and load of the experts, to turnout-report.jsonl
)
trainer.train()
model.save_pretrained(args.out / "adapter")  # plain PEFT

losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(report)
print(f"loss {losses[0]:.4f} to {losses[-1]:.4f} in {len(losses)} steps; adapter in {args.out}")

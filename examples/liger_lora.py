"""LoRA on a Qwen3-MoE: the experts in turnout, norms, rotary embedding and loss in Liger's kernels.

python examples/liger_lora.py --model path/to/Qwen3-30B-A3B --data texts.txt
python examples/liger_lora.py        # a tiny random model; on a CPU without Liger, in seconds

Liger's kernels are Triton's: they need a GPU. Where they can not run, a line says so.
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

args = tiny.arguments(__doc__)
if args.model is None:
    model, tokenizer = tiny.qwen3_moe()
else:
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

if reason := tiny.no_liger():
    print(f"Liger is left out: {reason}")
else:
    from liger_kernel.transformers import apply_liger_kernel_to_qwen3_moe

    # swiglu is the one to switch off: with transformers 5 it means the experts of this model
    apply_liger_kernel_to_qwen3_moe(
        rope=True, rms_norm=True, fused_linear_cross_entropy=True, swiglu=False, model=model
    )
    print("Liger runs the norms, the rotary embedding and the loss")
report = turnout.patch(model)  # before or after Liger
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
report.require("fused")  # an error if Liger took the experts

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
)
trainer.train()
model.save_pretrained(args.out / "adapter")  # plain PEFT

losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(report)
print(f"loss {losses[0]:.4f} to {losses[-1]:.4f} in {len(losses)} steps; adapter in {args.out}")

"""Supervised fine-tuning of an MoE with TRL: packing, checkpointing and the aux loss on.

python examples/trl_sft.py --model path/to/Qwen3-30B-A3B --data texts.txt
python examples/trl_sft.py           # a tiny random Qwen3-MoE, seconds on a CPU
"""

import tiny
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import turnout
from turnout.integrations.trainer import TurnoutCallback

args = tiny.arguments(__doc__)
if args.model is None:
    model, tokenizer = tiny.qwen3_moe()
else:
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
    tokenizer = AutoTokenizer.from_pretrained(args.model)

trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir=str(args.out),
        max_steps=args.steps,
        per_device_train_batch_size=2,
        learning_rate=args.lr,
        max_length=128,
        packing=True,
        gradient_checkpointing=True,
        router_aux_loss_coef=0.001,  # the routers keep their hooks, so the model has their logits
        bf16=torch.cuda.is_available(),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=Dataset.from_dict({"text": tiny.texts(args.data)}),
    processing_class=tokenizer,
    peft_config=LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=turnout.lora_targets(model),
        task_type="CAUSAL_LM",
    ),
    callbacks=[TurnoutCallback()],  # kernels and load of the experts, to turnout-report.jsonl
)
# behind SFTTrainer, which gives the model a forward of its own, with the aux loss in it
report = turnout.patch(model, aux_loss="fused")
report.require("fused")  # or an error that names each layer or loss that is not, and why
trainer.train()
trainer.save_model(str(args.out / "adapter"))  # plain PEFT

logs = [entry for entry in trainer.state.log_history if "loss" in entry]
print(report)
print(f"aux loss {logs[0]['aux_loss']:.4f} to {logs[-1]['aux_loss']:.4f}")
print(f"loss {logs[0]['loss']:.4f} to {logs[-1]['loss']:.4f} in {len(logs)} steps; {args.out}")

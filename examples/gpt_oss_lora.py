"""LoRA on the attention and on every expert of a gpt-oss, in a loop of your own with accelerate.

python examples/gpt_oss_lora.py --model path/to/gpt-oss-20b --data texts.txt
python examples/gpt_oss_lora.py      # a tiny random model, seconds on a CPU
"""

from itertools import cycle, islice

import tiny
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Mxfp4Config,
)

import turnout

args = tiny.arguments(__doc__)
if args.model is None:
    model, tokenizer = tiny.gpt_oss()
else:
    options = {"dtype": args.dtype}
    if hasattr(AutoConfig.from_pretrained(args.model), "quantization_config"):
        # the released checkpoints hold MXFP4 experts, which can not be trained as they are
        options["quantization_config"] = Mxfp4Config(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(args.model, **options)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

report = turnout.patch(model, recompute="gate_up")  # keep less for backward
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
loader = DataLoader(
    [tokenizer(text, truncation=True, max_length=512) for text in texts],
    batch_size=4,
    shuffle=True,
    collate_fn=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=args.lr)
accelerator = Accelerator()
model, optimizer, loader = accelerator.prepare(model.train(), optimizer, loader)

losses = []
for batch in islice(cycle(loader), args.steps):
    loss = model(**batch).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
    accelerator.print(f"step {len(losses)}: loss {losses[-1]:.4f}")
accelerator.unwrap_model(model).save_pretrained(args.out / "adapter")  # plain PEFT

accelerator.print(report)
accelerator.print(
    f"loss {losses[0]:.4f} to {losses[-1]:.4f} in {len(losses)} steps; adapter in {args.out}"
)

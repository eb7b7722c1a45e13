"""LoRA on a Qwen3-MoE in plain PyTorch: no trainer, the router's auxiliary loss on.

python examples/plain_loop.py --model path/to/Qwen3-30B-A3B --data texts.txt
python examples/plain_loop.py        # a tiny random model, seconds on a CPU
"""

from itertools import cycle, islice

import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import turnout

args = tiny.arguments(__doc__)
device = "cuda" if torch.cuda.is_available() else "cpu"
if args.model is None:
    model, tokenizer = tiny.qwen3_moe()
else:
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
model.to(device)

report = turnout.patch(model, router="fused")  # the routers in turnout too; their hooks still fire
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

documents = [tokenizer(text + tokenizer.eos_token)["input_ids"] for text in tiny.texts(args.data)]
adapters = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(adapters, lr=args.lr)

losses, aux = [], []
for tokens in islice(cycle(documents), args.steps):
    ids = torch.tensor([tokens], device=device)
    out = model.train()(ids, labels=ids, output_router_logits=True)  # adds the aux loss
    out.loss.backward()
    torch.nn.utils.clip_grad_norm_(adapters, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(out.loss.item())
    aux.append(out.aux_loss.item())
    print(f"step {len(losses)}: loss {losses[-1]:.4f}")
model.save_pretrained(args.out / "adapter")  # plain PEFT

print(report)
print(f"aux loss {aux[0]:.4f} to {aux[-1]:.4f}")
print(f"loss {losses[0]:.4f} to {losses[-1]:.4f} in {len(losses)} steps; adapter in {args.out}")

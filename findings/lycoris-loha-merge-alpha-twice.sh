#!/usr/bin/env bash
# One would guess: merging a LyCORIS adapter into the weights leaves the model that the adapter was trained as, whatever
# its algorithm.
# What happens: for LoHa the factor alpha/dim counts once in the forward pass and twice in `merge_to` and `onfly_merge`. With
# the default alpha (1) and dim (4) the merged model has a quarter of the change that was trained.
# Versions: lycoris-lora 4.1.3, torch 2.13.0 (CPU).
# Seen: change of the weights, merged / in the forward pass: LoHa dim 4 with alpha 4, 2, 1, 8: 1.0, 0.5, 0.25, 2.0; LoRA: 1.0
# for all four; LoHa's forward pass is alpha/dim times the product of its factors.
# Why it matters: a LoHa merged for testing or for prototypes seems weak or useless, and ranks below the LoRA beside it;
# alpha = dim hides it. Compare one output before and after merging.
set -euo pipefail
export OMP_NUM_THREADS=1
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 einops==0.8.2 lycoris-lora==4.1.3
cd "$tmp"
"$tmp/venv/bin/python" - <<'EOF'
import logging, sys, torch
logging.disable(logging.CRITICAL)
from lycoris import LycorisNetwork, create_lycoris

class Mlp(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = torch.nn.Linear(24, 24, bias=False)
    def forward(self, x):
        return self.fc1(x)

def strengths(algo, alpha, how, dim=4):
    """Strength of the change against alpha/dim times the product of the factors: in the forward pass, merged."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(Mlp()).eval()
    net = create_lycoris(model, 1.0, linear_dim=dim, linear_alpha=alpha, algo=algo).eval()
    net.apply_to()
    base = model[0].fc1.weight.detach().clone()
    for p in net.parameters():
        p.data.add_(torch.randn_like(p) * 0.1)
    factors = {k.split(".", 1)[1]: v for k, v in net.state_dict().items()}
    if algo == "loha":
        product = (factors["hada_w1_a"] @ factors["hada_w1_b"]) * (factors["hada_w2_a"] @ factors["hada_w2_b"])
    else:
        product = factors["lora_up.weight"] @ factors["lora_down.weight"]
    product = product * alpha / dim
    of = lambda change: round(float((change * product).sum() / product.pow(2).sum()), 3)
    forward = of(model(torch.eye(24)).T - base)
    net.restore()
    net.merge_to(1.0) if how == "merge_to" else net.onfly_merge()
    return forward, of(model[0].fc1.weight.detach() - base)

LycorisNetwork.apply_preset({"target_module": ["Mlp"]})
good = True
with torch.no_grad():
    for algo in ("lora", "loha"):
        for alpha in (4, 2, 1, 8):
            found = {how: strengths(algo, alpha, how) for how in ("merge_to", "onfly_merge")}
            print(f"{algo}, dim 4, alpha {alpha}: strength in the forward pass and merged: {found}")
            wanted = (1.0, alpha / 4 if algo == "loha" else 1.0)
            good &= set(found.values()) == {wanted}
if not good:
    sys.exit("changed: strength of a merged LoHa")
print("as seen: alpha/dim counts twice in a merged LoHa")
EOF

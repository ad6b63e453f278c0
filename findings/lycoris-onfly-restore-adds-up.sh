#!/usr/bin/env bash
# One would guess: after `onfly_merge()` and `onfly_restore()` of a LyCORIS network the model has its own weights again;
# that is what the pair is for.
# What happens: on a CPU nothing is restored. The copy that is kept is `weight.data.cpu()`, which on a CPU is the weight
# itself, and merging writes into it. The next merge adds its change to the one before; no error, no warning.
# Versions: lycoris-lora 4.1.3, torch 2.13.0 (CPU).
# Seen: distance of the weight from the original after merge and restore, in sizes of the change: 1.0 after one round, 2.0
# after two, 5.0 after five (LoRA, LoHa and LoKr alike).
# Why it matters: a market of adapters that is scored one by one on a CPU is scored in sums: the third score is that of three
# adapters, and the order decides. Keep `weight.clone()` oneself, or load the model afresh.
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

def merge_and_restore(algo, rounds):
    """Distance from the original weight after each round of merging and restoring, in sizes of the adapter's change."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(Mlp()).eval()
    net = create_lycoris(model, 1.0, linear_dim=4, linear_alpha=4, algo=algo).eval()
    net.apply_to()
    for p in net.parameters():
        p.data.add_(torch.randn_like(p) * 0.1)
    weight = lambda: model[0].fc1.weight.detach().clone()
    original, x = weight(), torch.eye(24)
    change = model(x).T - original
    net.restore()  # the adapter leaves the forward pass, as before a merge
    assert torch.equal(model(x).T, original)
    distances = []
    for _ in range(rounds):
        net.onfly_merge()
        net.onfly_restore()
        distances.append(round(float((weight() - original).norm() / change.norm()), 3))
    return distances

LycorisNetwork.apply_preset({"target_module": ["Mlp"]})
with torch.no_grad():
    seen = {algo: merge_and_restore(algo, 5) for algo in ("lora", "loha", "lokr")}
for algo, distances in seen.items():
    print(f"{algo}: after 1 to 5 rounds of merge and restore: {distances} (0 would be restored)")
if any(distances != [1.0, 2.0, 3.0, 4.0, 5.0] for distances in seen.values()):
    sys.exit("changed: onfly_restore on a CPU")
print("as seen: on a CPU onfly_restore leaves the merged weight, and merges add up")
EOF

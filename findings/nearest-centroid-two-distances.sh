#!/usr/bin/env bash
# One would guess: NearestCentroid has one notion of near: the class of the highest predict_proba is the one that predict
# names, and priors that differ by a hair change next to nothing.
# What happens: predict takes the Euclidean distance while the priors are equal (the default). predict_proba and
# decision_function always divide each feature by its within-class deviation first, and so does predict as soon as the
# priors are not equal to rounding, as with priors="empirical" and one class of six shots among those of five.
# Versions: scikit-learn 1.9.1, scipy 1.17.1, numpy 2.4.6.
# Seen: 5 classes, 5 shots, 64 features of unequal scale: predict and the argmax of predict_proba disagree on 65 % of 500
# queries; priors of 0.2001 and 0.1999 instead of 0.2 change as many labels, a sixth shot too; features of equal scale: 16 %.
# Why it matters: it is the nearest-prototype classifier of few-shot tables. Accuracy comes from one model, confidence,
# calibration and refusals from another; one more shot in one class changes the distance. Standardise the features oneself.
set -euo pipefail
export OMP_NUM_THREADS=1
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile numpy==2.4.6 scipy==1.17.1 scikit-learn==1.9.1
cd "$tmp"
"$tmp/venv/bin/python" - <<'EOF'
import sys
import numpy as np
from sklearn.neighbors import NearestCentroid

labels = np.arange(5).repeat(5)

def labels_by_each_way(scales):
    """Labels of 500 queries: predict, argmax of predict_proba, predict with other priors, one shot more in class 0."""
    rng = np.random.default_rng(0)
    means = rng.normal(size=(5, 64)) * 0.3
    shots = (means[labels] + rng.normal(size=(25, 64))) * scales
    queries = (means.repeat(100, 0) + rng.normal(size=(500, 64))) * scales
    model = NearestCentroid().fit(shots, labels)
    near = np.linalg.norm(queries[:, None] - model.centroids_, axis=2).argmin(1)
    inside = np.sqrt(sum(shots[labels == c].var(0) * 5 for c in range(5)) / 20)  # pooled deviation within the classes
    scaled = np.linalg.norm((queries[:, None] - model.centroids_) / inside, axis=2).argmin(1)
    assert np.array_equal(model.predict(queries), near)  # predict is Euclidean ...
    assert np.array_equal(model.predict_proba(queries).argmax(1), scaled)  # ... and predict_proba is not
    hair = NearestCentroid(priors=[0.2001, 0.2, 0.2, 0.2, 0.1999]).fit(shots, labels)
    more = np.vstack([shots, model.centroids_[:1]]), np.append(labels, 0)  # the sixth shot moves no centroid
    six = {p: NearestCentroid(priors=p).fit(*more).predict(queries) for p in ("uniform", "empirical")}
    differ = lambda other: round(float((near != other).mean()), 3)
    return differ(scaled), differ(hair.predict(queries)), differ(six["uniform"]), differ(six["empirical"])

seen = {}
for name, scales in (("unequal scales", np.exp(np.random.default_rng(1).normal(size=64))), ("equal scales", np.ones(64))):
    seen[name] = labels_by_each_way(scales)
    print(f"{name}: labels that differ from those of predict: predict_proba {seen[name][0]:.0%}, priors a hair apart "
          f"{seen[name][1]:.0%}, six shots in one class, uniform {seen[name][2]:.0%}, empirical priors {seen[name][3]:.0%}")
probabilities, hair, uniform, empirical = seen["unequal scales"]
if not (probabilities > 0.2 and hair > 0.2 and uniform == 0 and empirical > 0.2):
    sys.exit("changed: the distances of NearestCentroid")
print("as seen: predict and predict_proba use two distances, and unequal priors change that of predict")
EOF

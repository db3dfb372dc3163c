"""Solutions of docs/exercises.md.  `python grade.py tests/solutions.py:greedy` grades one."""
import torch
from torchvision.ops import box_iou

import assign

INF = float("inf")


def argmin_rule(cost):
    """1: each object its cheapest prediction, whoever else wants it."""
    if not len(cost):
        return torch.zeros(2, 0, dtype=torch.long).unbind()
    best, q = cost.min(0)
    g = torch.arange(cost.shape[1], device=cost.device)
    return q[best < INF], g[best < INF]


argmin_rule.shares_predictions = True


def greedy(cost):
    """2: the cheapest pair of all, then the cheapest of what is left, ..."""
    left, pairs = cost.clone(), []
    while left.numel() and left.min() < INF:
        q, g = divmod(int(left.argmin()), left.shape[1])
        pairs.append((q, g))
        left[q], left[:, g] = INF, INF
    return torch.tensor(pairs, dtype=torch.long).view(-1, 2).unbind(1)


greedy.one_to_one = True


def location_only(one, target):
    """3: Eq. 5 without its first term."""
    return assign.predicted_location(one, target)


def two_predictions(cost):
    """4: every object twice; the Hungarian then gives it two different predictions."""
    q, g = assign.hungarian(cost.repeat(1, 2))
    return q, g % max(1, cost.shape[1])


def auction(cost, epsilon=1e-3):
    """5: objects bid for predictions (Bertsekas); within G steps of the cheapest in total.

    A step is epsilon times the largest cost.

    Each object also has a prediction of its own that is dearer than all: who ends there has none.
    Ties can make two answers equally good, and then the order decides.
    """
    Q, G = cost.shape
    if not Q or not G:
        return torch.zeros(2, 0, dtype=torch.long).unbind()
    allowed = cost.isfinite()
    scale = max(1e-6, float(cost[allowed].abs().max()) if allowed.any() else 0.0)
    dear = 3 * scale                                     # than any swap of two pairs saves
    own = torch.where(torch.eye(G, dtype=torch.bool), dear, 4 * dear)
    value = -torch.cat([torch.where(allowed, cost, torch.tensor(4 * dear)), own]).double()
    price, owner = torch.zeros(Q + G, dtype=torch.float64), torch.full((Q + G,), -1)
    waiting = list(range(G))
    while waiting:
        g = waiting.pop()
        best = (value[:, g] - price).topk(2)
        q = int(best.indices[0])
        price[q] += float(best.values[0] - best.values[1]) + epsilon * scale
        if owner[q] >= 0:
            waiting.append(int(owner[q]))
        owner[q] = g
    q = (owner[:Q] >= 0).nonzero()[:, 0]
    g = owner[q]
    keep = allowed[q, g]
    return q[keep], g[keep]


auction.one_to_one = True


def quality(one, target, a=0.8, radius=1.5):
    """6: DeFCN's quality p^(1-a) IoU^a, for points within 1.5 strides of the object's centre."""
    gt = target["boxes"]
    p = one.logits[:, target["labels"]].sigmoid()
    iou = box_iou(one.boxes, gt)
    points = (one.candidates[:, :2] + one.candidates[:, 2:]) / 2
    off = (points[:, None] - (gt[:, :2] + gt[:, 2:])[None] / 2).abs().amax(2)    # (Q, G)
    return (-p ** (1 - a) * iou ** a).masked_fill(off > radius * one.strides[:, None], INF)


def task_aligned(one, target, a=1.0, b=6.0):
    """7: the task-aligned metric p^a IoU^b."""
    p = one.logits[:, target["labels"]].sigmoid()
    return -p ** a * box_iou(one.boxes, target["boxes"]) ** b


def many_early_one_late(cost, progress=1.0):
    """8: six predictions an object at first, fewer and fewer, one from half of training on."""
    k = round(6 * (1 - progress / 0.6))
    return assign.top_k(cost, k) if k > 1 else assign.hungarian(cost)

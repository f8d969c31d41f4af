"""CenterCLIP against k-medoids written out on the matrix of distances."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cases.groups import tokens_of
from tokred.methods.center_clip import cluster_segments


def k_medoids(x: Tensor, clusters: int) -> tuple[list[int], Tensor]:
    """(ascending medoids, assignment to them) of x [N, C]."""
    distance = torch.cdist(x.double(), x.double())
    medoids = [int(x.double().norm(dim=1).argmax())]
    while len(medoids) < clusters:
        medoids.append(int(distance[:, medoids].min(1).values.argmax()))
    while True:
        assignment = distance[:, medoids].argmin(1)
        new = []
        for cluster in range(clusters):
            members = (assignment == cluster).nonzero()[:, 0]
            sums = distance[members][:, members].sum(0)
            new.append(int(members[sums.argmin()]))
        if new == medoids:
            break
        medoids = new
    medoids = sorted(medoids)
    return medoids, distance[:, medoids].argmin(1)


@pytest.mark.parametrize("means", (False, True))
def test_segments(means: bool) -> None:
    x = tokens_of(2, 4 * 9).view(2, 4, 9, 16)
    done = cluster_segments(x, 2, 5, means=means)
    assert done.tokens.shape == (2, 2, 6, 16)
    for item in range(2):
        for segment in range(2):
            frames = x[item, 2 * segment : 2 * segment + 2]
            rest = frames[:, 1:].reshape(16, 16)
            medoids, assignment = k_medoids(rest, 5)
            kept = torch.stack(
                [rest[assignment == c].mean(0) if means else rest[medoids[c]] for c in range(5)]
            )
            torch.testing.assert_close(done.tokens[item, segment, 0], frames[:, 0].mean(0))
            torch.testing.assert_close(done.tokens[item, segment, 1:], kept)
            slots = done.token_map[item].view(4, 9)[2 * segment : 2 * segment + 2]
            assert (slots[:, 0] == 6 * segment).all()
            assert torch.equal(slots[:, 1:].flatten() - 6 * segment - 1, assignment.int())


def test_refusals() -> None:
    x = torch.zeros(1, 4, 3, 2)
    with pytest.raises(ValueError, match="segments must divide the 4 frames of x, got 3"):
        cluster_segments(x, 3, 1)
    with pytest.raises(ValueError, match="clusters must be from 1 to 4, got 5"):
        cluster_segments(x, 2, 5)

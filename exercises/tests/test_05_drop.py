import torch

PREFIX = "model.layers.0.block_sparse_moe.experts"


def expert(units=40, width=16, seed=1):
    torch.manual_seed(seed)
    return {"w1": torch.randn(units, width), "w2": torch.randn(width, units) + 3, "w3": torch.randn(units, width) * 5}


def changed_units(matrix, old, new):
    """The hidden units whose weights differ: rows of w1 and w3, columns of w2."""
    return (old != new).any(dim=0 if matrix == "w2" else 1).nonzero().flatten().tolist()


def redrawn(number=0, share=0.5, seed=1, **sizes):
    from mix import redraw

    old = expert(**sizes)
    new = {matrix: redraw(f"{PREFIX}.{number}.{matrix}.weight", old[matrix], share, seed) for matrix in old}
    return old, new


def test_so_many_units_are_drawn_anew():
    for share, count in ((0.5, 20), (0.25, 10), (0.01, 1), (1.0, 40)):
        old, new = redrawn(share=share)
        for matrix in old:
            assert new[matrix].shape == old[matrix].shape and new[matrix].dtype == old[matrix].dtype
            assert len(changed_units(matrix, old[matrix], new[matrix])) == count


def test_a_unit_is_redrawn_in_all_three_matrices():
    old, new = redrawn()
    units = [changed_units(matrix, old[matrix], new[matrix]) for matrix in old]
    assert units[0] == units[1] == units[2]


def test_a_redrawn_unit_is_new_in_every_weight():
    old, new = redrawn()
    for matrix in old:
        dim = 1 if matrix == "w2" else 0
        units = torch.tensor(changed_units(matrix, old[matrix], new[matrix]))
        assert (old[matrix].index_select(dim, units) != new[matrix].index_select(dim, units)).all()


def test_new_weights_are_like_the_old_ones():
    """Each matrix has its own mean and deviation, those of what it dropped: w2 has mean 3 and w3 deviation 5."""
    old, new = redrawn(units=400, width=64)
    for matrix, mean, std in (("w1", 0, 1), ("w2", 3, 1), ("w3", 0, 5)):
        drawn = new[matrix][new[matrix] != old[matrix]]
        assert abs(drawn.mean() - mean) < 0.05 * std and abs(drawn.std() - std) < 0.05 * std


def test_every_expert_has_its_own_draw_and_it_repeats():
    first, again, other, reseeded = redrawn()[1], redrawn()[1], redrawn(number=1)[1], redrawn(seed=2)[1]
    assert all(first[matrix].equal(again[matrix]) for matrix in first)
    for changed in (other, reseeded):
        assert not any(first[matrix].equal(changed[matrix]) for matrix in first)
    old = expert()
    assert changed_units("w1", old["w1"], first["w1"]) != changed_units("w1", old["w1"], other["w1"])

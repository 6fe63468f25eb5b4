"""What a branch may not say of itself: every statement is checked where it is used."""

import dataclasses

import jax.numpy as jnp
import pytest
from test_branches import BRANCHES

from repopt_jax import Branch, Centre, Full, Identity, check_block


@pytest.mark.parametrize("branch", [Full(), Centre(1), Identity()], ids=str)
def test_a_block_is_checked_where_promotion_is_refused(branch, x64, strict):
    """In float64 too, whichever test checked the type first."""
    own = type("Own", (type(branch),), {})(**dataclasses.asdict(branch))
    check_block({"b": own}, (3, 3, 2, 2))


@pytest.mark.parametrize(
    ("embed", "message"),
    [
        (lambda w, k: jnp.zeros(k).at[0, 0].set(w[0, 0]), "mask"),
        (
            lambda w, k: Centre(1).embed(w[..., ::-1], k),
            "by_channel",
        ),
    ],
    ids=["another place", "channels exchanged"],
)
def test_a_subclass_that_breaks_what_its_parent_says_of_itself_is_refused(embed, message):
    class Changed(Centre):
        def embed(self, weight, kernel_shape):
            return embed(weight, kernel_shape)

    with pytest.raises(ValueError, match=message):
        check_block({"changed": Changed(1)}, (3, 3, 2, 4))


class Spread(Full):
    """One weight per channel, in every tap: no placement, though its parent is one."""

    def weight_shape(self, kernel_shape):
        return (1, 1, *kernel_shape[2:])

    def embed(self, weight, kernel_shape):
        return jnp.broadcast_to(weight, kernel_shape)


class Negative(Full):
    def embed(self, weight, kernel_shape):
        return -weight


@pytest.mark.parametrize("branch", [Spread(), Negative()], ids=["several places", "not a copy"])
def test_a_branch_that_is_no_placement_may_not_say_that_it_is(branch):
    """Its multiplier would be a mask, and silently wrong."""
    with pytest.raises(ValueError, match="placement"):
        check_block({"odd": branch}, (3, 3, 2, 2))


@dataclasses.dataclass(frozen=True)
class Shifted(Branch):
    """Linear, and a placement, for some of its fields' values alone."""

    shift: float = 0.0
    taps: int = 1
    placement = True

    def weight_shape(self, kernel_shape):
        return kernel_shape[-2:]

    def embed(self, weight, kernel_shape):
        kernel = jnp.zeros(kernel_shape, weight.dtype)
        return kernel.at[: self.taps].set(weight) + jnp.asarray(self.shift, weight.dtype)


@pytest.mark.parametrize(
    ("branch", "reason"), [(Shifted(shift=1.0), "constant"), (Shifted(taps=2), "placement")]
)
def test_every_statement_of_a_branch_is_checked(branch, reason):
    """Another one of its class that passed says nothing of it."""
    check_block({"good": Shifted()}, (3, 2, 4))
    with pytest.raises(ValueError, match=reason):
        check_block({"bad": branch}, (3, 2, 4))


def test_every_shape_of_a_kernel_is_checked():
    @dataclasses.dataclass(frozen=True)
    class Wide(Shifted):
        def embed(self, weight, kernel_shape):
            return super().embed(weight, kernel_shape) + jnp.float32(kernel_shape[-1] == 8)

    check_block({"branch": Wide()}, (3, 2, 4))
    with pytest.raises(ValueError, match="constant"):
        check_block({"branch": Wide()}, (3, 2, 8))


def test_types_of_the_package_are_what_they_say():
    """They are not asked where they are used; here they are, as anyone's are."""
    for branch, shape, _ in BRANCHES.values():
        own = type("Own", (type(branch),), {})
        fields = {f.name: getattr(branch, f.name) for f in dataclasses.fields(branch)}
        check_block({"b": own(**fields)}, shape)

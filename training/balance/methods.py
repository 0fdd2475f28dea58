"""From a recipe's `balance` section to its method: the only place that knows which class is whose."""

from typing import NamedTuple

from data_prep.encode import Encoder
from training.balance.blend import UnimodalLossesMethod
from training.balance.cggm import CggmMethod
from training.balance.hook import Method, Showing, World
from training.balance.lnln_hook import Corrupting, LnlnMethod
from training.balance.miles import MilesMethod
from training.balance.mnl import MnlMethod
from training.balance.msam import MsamMethod
from training.balance.ogm import Dropping, ModalityDropoutMethod, OgmGeMethod, RandomFactorsMethod, factors_of
from training.config import Recipe, RecipeError


class Parts(NamedTuple):
    method: type[Method]
    showing: type[Showing] | None = None


METHODS = {
    "miles": Parts(MilesMethod), "cggm": Parts(CggmMethod), "mnl": Parts(MnlMethod), "msam": Parts(MsamMethod),
    "lnln": Parts(LnlnMethod, Corrupting), "ogm_ge": Parts(OgmGeMethod), "unimodal_losses": Parts(UnimodalLossesMethod),
    "modality_dropout": Parts(ModalityDropoutMethod, Dropping), "random_factors": Parts(RandomFactorsMethod),
}


def method_of(recipe: Recipe, world: World) -> Method | None:
    """The recipe's method, or None when it has none or one of strength 0."""
    balance = recipe.active_balance
    return None if balance is None else METHODS[balance.method].method(balance, world)


def showing_of(recipe: Recipe, encoder: Encoder) -> Showing | None:
    """What the recipe's method changes about how problems are shown."""
    balance = recipe.active_balance
    if balance is None or (kind := METHODS[balance.method].showing) is None:
        return None
    try:
        return kind(balance, recipe.seed, encoder)
    except ValueError as error:
        raise RecipeError(f"balance: {error}") from error


def check(recipe: Recipe, *, deepspeed: bool) -> None:
    """What can be said before the model is loaded.

    Raises:
        RecipeError: the method needs a file that is not there, or cannot be trained this way.
    """
    balance = recipe.active_balance
    if balance is None:
        return
    if deepspeed and METHODS[balance.method].method.changes_gradients:
        raise RecipeError(f"balance: {balance.method} changes gradients between the backward pass and the optimizer's step, which "
                          "DeepSpeed makes in one; use torchrun or accelerate without it")
    if balance.method == "random_factors":
        factors_of(balance.of, recipe.seed)

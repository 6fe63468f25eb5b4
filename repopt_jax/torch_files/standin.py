"""The inert record kept in place of every class, function and object that is not rebuilt."""

from typing import Any


class Standin:
    """A name found in a pickle, or an object that the pickle would have made with it.

    Nothing of that name is imported or called: the stand-in only keeps what the file says.

    Attributes:
      name: module and name joined by a dot, such as `yacs.config.CfgNode`.
      args: arguments of the call; None for the bare class or function.
      kwargs: keyword arguments of the call, {} where there are none.
      state: what pickle would have handed to `__setstate__`, an object's attributes as a rule;
        None where the file gives none.
      sequence: elements, where the class is a kind of list or set.
      mapping: items, where the class is a kind of dict.

    Example:
      >>> Standin("torch.device", ("cpu",))
      <stand-in for an object of torch.device>
    """

    __slots__ = ("args", "kwargs", "mapping", "name", "sequence", "state")

    def __init__(self, name: str, args: tuple | None = None, kwargs: dict | None = None):
        self.name = name
        self.args = args
        self.kwargs = {} if kwargs is None else kwargs
        self.state: Any = None
        self.sequence: list = []
        self.mapping: dict = {}

    def __repr__(self) -> str:
        # Never shows the contents, which may be nested without end, nor control characters.
        kind = "" if self.args is None else "an object of "
        return f"<stand-in for {kind}{ascii(self.name)[1:-1][:200]}>"

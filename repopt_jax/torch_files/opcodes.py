"""What each opcode of a pickle does to the `Unpickler`: protocols 0 to 5.

The opcodes that could run code (GLOBAL, STACK_GLOBAL, INST, OBJ, REDUCE, NEWOBJ, NEWOBJ_EX,
BUILD, the extension registry and persistent ids) all end in `Unpickler.name`, `call`, `build`
and `load_persistent`, which make records.
"""

import pickle
import struct
from collections.abc import Callable
from typing import Any

from repopt_jax.torch_files.limits import MAX_INT_BYTES, TorchFileError, quote
from repopt_jax.torch_files.standin import Standin

_BYTE, _HALF, _INT, _UINT, _LONG = map(struct.Struct, ("<B", "<H", "<i", "<I", "<Q"))
_DOUBLE = struct.Struct(">d")


def _number(u, layout: struct.Struct) -> Any:
    return layout.unpack(u.read(layout.size))[0]


# Numbers and text


def _proto(u):
    version = _number(u, _BYTE)
    if version > pickle.HIGHEST_PROTOCOL:
        raise TorchFileError(f"its pickle has protocol {version}, which does not exist yet")


def _int_line(u):
    line = u.line()
    truths = {b"00": False, b"01": True}
    u.push(truths[line] if line in truths else int(line), 32)


def _long_line(u):
    u.push(int(u.line().rstrip(b"L")), 500)


def _long(u, layout):
    count = _number(u, layout)
    if not 0 <= count <= MAX_INT_BYTES:
        raise TorchFileError(f"its pickle holds an integer of {count} bytes")
    u.push(int.from_bytes(u.read(count), "little", signed=True), 32 + count)


def _text(u, layout):
    data = u.read(_number(u, layout))
    u.push(data.decode("utf-8"), 64 + 4 * len(data))


def _unicode_line(u):
    u.push(u.line().decode("raw-unicode-escape"), 100)


def _bytes(u, layout):
    data = u.read(_number(u, layout))
    u.push(data, 64 + len(data))


def _python2_text(data: bytes) -> str | bytes:
    """Python 2 wrote text and bytes alike; what is not UTF-8 stays bytes."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data


def _python2_string(u, layout):
    data = u.read(_number(u, layout))
    u.push(_python2_text(data), 64 + 4 * len(data))


def _string_line(u):
    line = u.line()
    if len(line) < 2 or line[:1] not in (b"'", b'"') or line[-1] != line[0] or b"\\" in line:
        raise TorchFileError(f"its pickle holds the malformed string {quote(line)}")
    u.push(_python2_text(line[1:-1]), 64 + 4 * len(line))


# Containers


def _mark(u):
    u.marks.append(len(u.stack))
    u.budget.spend(40)


def _tuple(u, count):
    items = tuple(u.stack[len(u.stack) - count :])
    if len(items) != count:
        raise IndexError
    del u.stack[len(u.stack) - count :]
    u.push(items, 80 + 8 * count)


def _marked_tuple(u):
    items = u.pop_mark()
    u.push(tuple(items), 80 + 8 * len(items))


def _marked_list(u):
    u.push(u.pop_mark(), 80)


def _pairs(items: list) -> list[tuple[Any, Any]]:
    if len(items) % 2:
        raise TorchFileError("its pickle holds a dict whose last key has no value")
    return list(zip(items[::2], items[1::2], strict=True))


def _marked_dict(u):
    result: dict = {}
    u.set_items(result, _pairs(u.pop_mark()))
    u.push(result, 100)


def _set_item(u):
    value, key = u.stack.pop(), u.stack.pop()
    u.set_items(u.stack[-1], [(key, value)])


def _set_items(u):
    pairs = _pairs(u.pop_mark())
    u.set_items(u.stack[-1], pairs)


def _append(u):
    value = u.stack.pop()
    u.extend(u.stack[-1], [value])
    u.budget.spend(64)  # an empty list takes no room for elements; the first takes a block


def _appends(u):
    values = u.pop_mark()
    u.extend(u.stack[-1], values)


def _empty_set(u):
    u.push(Standin("builtins.set", ()), 400)


def _frozenset(u):
    result = Standin("builtins.frozenset", ())
    result.sequence = u.pop_mark()
    u.push(result, 400)


# Stack and memo


def _pop(u):
    if u.marks and u.marks[-1] == len(u.stack):
        u.marks.pop()
    else:
        u.stack.pop()


def _duplicate(u):
    u.stack.append(u.stack[-1])


def _put(u, index):
    if index not in u.memo:
        u.budget.spend(150)
    u.memo[index] = u.stack[-1]


def _get(u, index):
    u.stack.append(u.memo[index])


# What would call or import


def _global(u):
    module, name = u.line().decode("utf-8"), u.line().decode("utf-8")
    u.stack.append(u.name(module, name))


def _stack_global(u):
    name, module = u.stack.pop(), u.stack.pop()
    u.stack.append(u.name(module, name))


def _reduce(u):
    args, function = u.stack.pop(), u.stack.pop()
    u.stack.append(u.call(function, args))


def _new_object_with_names(u):
    kwargs, args, function = u.stack.pop(), u.stack.pop(), u.stack.pop()
    if not isinstance(kwargs, dict):
        raise TorchFileError(f"its pickle passes {quote(kwargs)} as keyword arguments")
    u.stack.append(u.call(function, args, kwargs))


def _instance(u):
    module, name = u.line().decode("utf-8"), u.line().decode("utf-8")
    u.stack.append(u.call(u.name(module, name), tuple(u.pop_mark())))


def _object(u):
    function, *args = u.pop_mark()
    u.stack.append(u.call(function, tuple(args)))


def _extension(u, layout):
    u.stack.append(u.name("copyreg", f"extension_{_number(u, layout)}"))


def _build(u):
    state = u.stack.pop()
    u.build(u.stack[-1], state)


def _persistent_line(u):
    u.stack.append(u.load_persistent(u.line().decode("ascii")))


def _persistent(u):
    u.stack.append(u.load_persistent(u.stack.pop()))


def _refuse_buffer(u):
    raise TorchFileError("its pickle keeps buffers outside the file")


OPCODES: dict[bytes, Callable] = {
    pickle.PROTO: _proto,
    pickle.FRAME: lambda u: u.read(8),
    pickle.NONE: lambda u: u.stack.append(None),
    pickle.NEWTRUE: lambda u: u.stack.append(True),
    pickle.NEWFALSE: lambda u: u.stack.append(False),
    pickle.INT: _int_line,
    pickle.BININT: lambda u: u.push(_number(u, _INT), 32),
    pickle.BININT1: lambda u: u.stack.append(_number(u, _BYTE)),
    pickle.BININT2: lambda u: u.push(_number(u, _HALF), 32),
    pickle.LONG: _long_line,
    pickle.LONG1: lambda u: _long(u, _BYTE),
    pickle.LONG4: lambda u: _long(u, _INT),
    pickle.FLOAT: lambda u: u.push(float(u.line()), 32),
    pickle.BINFLOAT: lambda u: u.push(_number(u, _DOUBLE), 32),
    pickle.STRING: _string_line,
    pickle.BINSTRING: lambda u: _python2_string(u, _UINT),
    pickle.SHORT_BINSTRING: lambda u: _python2_string(u, _BYTE),
    pickle.UNICODE: _unicode_line,
    pickle.SHORT_BINUNICODE: lambda u: _text(u, _BYTE),
    pickle.BINUNICODE: lambda u: _text(u, _UINT),
    pickle.BINUNICODE8: lambda u: _text(u, _LONG),
    pickle.SHORT_BINBYTES: lambda u: _bytes(u, _BYTE),
    pickle.BINBYTES: lambda u: _bytes(u, _UINT),
    pickle.BINBYTES8: lambda u: _bytes(u, _LONG),
    pickle.BYTEARRAY8: lambda u: _bytes(u, _LONG),
    pickle.NEXT_BUFFER: _refuse_buffer,
    pickle.READONLY_BUFFER: _refuse_buffer,
    pickle.MARK: _mark,
    pickle.EMPTY_TUPLE: lambda u: u.stack.append(()),
    pickle.TUPLE1: lambda u: _tuple(u, 1),
    pickle.TUPLE2: lambda u: _tuple(u, 2),
    pickle.TUPLE3: lambda u: _tuple(u, 3),
    pickle.TUPLE: _marked_tuple,
    pickle.EMPTY_LIST: lambda u: u.push([], 64),
    pickle.LIST: _marked_list,
    pickle.APPEND: _append,
    pickle.APPENDS: _appends,
    pickle.EMPTY_DICT: lambda u: u.push({}, 100),
    pickle.DICT: _marked_dict,
    pickle.SETITEM: _set_item,
    pickle.SETITEMS: _set_items,
    pickle.EMPTY_SET: _empty_set,
    pickle.ADDITEMS: _appends,
    pickle.FROZENSET: _frozenset,
    pickle.POP: _pop,
    pickle.POP_MARK: lambda u: u.pop_mark(),
    pickle.DUP: _duplicate,
    pickle.PUT: lambda u: _put(u, int(u.line())),
    pickle.BINPUT: lambda u: _put(u, _number(u, _BYTE)),
    pickle.LONG_BINPUT: lambda u: _put(u, _number(u, _UINT)),
    pickle.MEMOIZE: lambda u: _put(u, len(u.memo)),
    pickle.GET: lambda u: _get(u, int(u.line())),
    pickle.BINGET: lambda u: _get(u, _number(u, _BYTE)),
    pickle.LONG_BINGET: lambda u: _get(u, _number(u, _UINT)),
    pickle.GLOBAL: _global,
    pickle.STACK_GLOBAL: _stack_global,
    pickle.INST: _instance,
    pickle.OBJ: _object,
    pickle.REDUCE: _reduce,
    pickle.NEWOBJ: _reduce,
    pickle.NEWOBJ_EX: _new_object_with_names,
    pickle.BUILD: _build,
    pickle.EXT1: lambda u: _extension(u, _BYTE),
    pickle.EXT2: lambda u: _extension(u, _HALF),
    pickle.EXT4: lambda u: _extension(u, _INT),
    pickle.PERSID: _persistent_line,
    pickle.BINPERSID: _persistent,
}

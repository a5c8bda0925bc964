"""The graph of a torch.export archive, as JSON: every text in it is held to what may stand there, since torch turns many into code.

torch.export.load evaluates the expressions of sizes (sympy.sympify calls eval), writes names into Python source that it executes, and looks
operators up by attribute from `torch` down, from where `os.system` can be reached. So nothing passes that is not known here.
"""

from __future__ import annotations

import ast
import json
import re
from typing import Any

IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}")
QUALIFIED = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+){0,100}")

_OPERATOR = re.compile(r"torch\.ops\.([a-z_0-9]+)\.([A-Za-z0-9_]+)\.([A-Za-z][A-Za-z0-9_]*)")
_NAMESPACES = frozenset({"_quantized", "aten", "prims", "quantized", "quantized_decomposed", "torchvision"})
_OUTSIDE = frozenset({"from_file", "save"})
"""Operators that map or write files when the model runs."""
_DUNDERS = frozenset({"__and__", "__or__", "__xor__", "__lshift__", "__rshift__"})
_TARGETS = frozenset(
    {
        *(f"torch.ops.higher_order.{name}" for name in ("cond", "wrap_with_autocast", "wrap_with_set_grad_enabled")),
        *(f"torch.sym_{name}" for name in ("float", "int", "ite", "max", "min", "not", "sum", "sqrt")),
        "torch._sym_sqrt",
        *(f"math.{name}" for name in ("ceil", "floor", "sqrt", "trunc")),
        *(
            f"_operator.{name}"
            for name in (
                *(
                    "add",
                    "and_",
                    "eq",
                    "floordiv",
                    "ge",
                    "getitem",
                    "gt",
                    "le",
                    "lt",
                    "mod",
                    "mul",
                    "ne",
                    "neg",
                    "not_",
                ),
                *("or_", "pos", "pow", "sub", "truediv", "xor"),
            )
        ),
    }
)

_FUNCTIONS = frozenset(
    {
        *("Add", "And", "CeilDiv", "CeilToInt", "CleanDiv", "Equality", "FloatTrueDiv", "FloorDiv", "FloorToInt"),
        *(
            "GreaterThan",
            "Identity",
            "IntTrueDiv",
            "Integer",
            "LessThan",
            "Max",
            "Min",
            "Mod",
            "ModularIndexing",
            "Mul",
        ),
        *("Not", "Or", "Pow", "PythonMod", "Rational", "RoundToInt", "StrictGreaterThan", "StrictLessThan", "Symbol"),
        *("ToFloat", "TruncToFloat", "TruncToInt", "Unequality", "Where"),
    }
)
"""What sympy.srepr and torch's own functions write into the expression of a size."""
_ASSUMPTIONS = frozenset({"integer", "positive", "nonnegative", "nonzero", "real", "negative"})
_MAX_EXPRESSION = 4096
_MAX_EXPONENT = 16
_MAX_DEPTH = 100

_CONTAINERS = frozenset({"builtins.tuple", "builtins.list", "builtins.dict"})

_FREE_MAPS = frozenset({"tensor_values", "sym_int_values", "sym_bool_values", "sym_float_values", "range_constraints"})
"""Maps from the names of the graph's values to what they are."""
_DROPPED = frozenset({"metadata", "guards_code"})
"""Where a node comes from, and Python source that checks inputs. Neither is carried over to what is loaded."""
_REFUSED = {
    "as_custom_obj": "holds an object of a class of its own",
    "custom_obj": "holds an object of a class of its own",
    "class_fqn": "holds an object of a class of its own",
    "token": "has effects beside its answer",
}
KNOWN_KEYS = frozenset(
    {
        *("arg", "as_bool", "as_bools", "as_complex", "as_device", "as_expr", "as_float", "as_floats", "as_float_lists"),
        *("as_graph", "as_int", "as_int_lists", "as_ints", "as_layout", "as_memory_format", "as_name", "as_nested_tensors"),
        *("as_none", "as_operator", "as_optional_tensor", "as_optional_tensors", "as_scalar_type", "as_string"),
        *("as_string_to_argument", "as_strings", "as_sym_bool", "as_sym_bools", "as_sym_float", "as_sym_floats"),
        *("as_sym_int", "as_sym_ints", "as_tensor", "as_tensors", "buffer", "buffer_mutation", "buffer_name"),
        *("constant_input", "custom_obj_name", "custom_obj_values", "device", "dtype", "expr_str", "field_names"),
        *("forward_arg_names", "fqn", "gradient_to_parameter", "gradient_to_user_input", "graph", "graph_module", "hint"),
        *("imag", "in_spec", "index", "input_specs", "inputs", "is_hop_single_tensor_return", "is_single_tensor_return"),
        *("kind", "layout", "loss_output", "major", "max_val", "min_val", "minor", "module_call_graph", "name", "nodes"),
        *("opset_version", "out_spec", "output_specs", "outputs", "parameter", "parameter_mutation", "parameter_name"),
        *("persistent", "real", "requires_grad", "schema_version", "signature", "sizes", "storage_offset", "strides"),
        *("target", "tensor_constant", "tensor_constant_name", "torch_version", "treespec_namedtuple_fields", "type"),
        *("user_input", "user_input_mutation", "user_input_name", "user_output", "value", "verifiers"),
    }
    | _FREE_MAPS
    | _DROPPED
    | set(_REFUSED)
)  # fmt: skip


class Foreign(ValueError):
    """Something that torch.export.save does not write, in words."""


def parsed(content: bytes, what: str) -> Any:
    """JSON, as torch reads it. Raises Foreign."""
    try:
        return json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise Foreign(f"{what} is not JSON that can be read ({error})") from error


def cleaned(value: Any, key: str = "", depth: int = 0) -> Any:
    """The same JSON without what is dropped; every key and every text in it is one that may stand there. Raises Foreign."""
    if depth > _MAX_DEPTH:
        raise Foreign(f"{key} is nested more than {_MAX_DEPTH} deep")
    if isinstance(value, dict):
        return {k: _entry(key, k, item, depth) for k, item in value.items()}
    if isinstance(value, list):
        return [cleaned(item, key, depth + 1) for item in value]
    if isinstance(value, str):
        _check_text(key, value)
    elif isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 1 << 63:
        raise Foreign(f"{key} holds {value}, which no size or number of a graph is")
    return value


def _entry(parent: str, key: str, item: Any, depth: int) -> Any:
    if parent in _FREE_MAPS or parent in ("as_string_to_argument", "opset_version"):
        if not IDENTIFIER.fullmatch(key):
            raise Foreign(f"{parent} has the name {_shown(key)}")
        return cleaned(item, "value", depth + 1)
    if key in _REFUSED and item is not None:
        raise Foreign(f"it {_REFUSED[key]} ({key})")
    if key not in KNOWN_KEYS:
        raise Foreign(f"it has the part {_shown(key)}, which is not known here")
    if key in _DROPPED:
        return [] if key == "guards_code" else {}
    if key in ("custom_obj_values", "treespec_namedtuple_fields"):
        if item:
            raise Foreign(f"{key} is not empty: plain tensors, tuples, lists and dicts are needed")
        return item
    return cleaned(item, key, depth + 1)


def _check_text(key: str, text: str) -> None:
    match key:
        case "name" | "as_name" | "forward_arg_names" | "user_input_name":
            good = not text or bool(IDENTIFIER.fullmatch(text))
        case "parameter_name" | "buffer_name" | "tensor_constant_name" | "fqn":
            good = not text or bool(QUALIFIED.fullmatch(text))
        case "target" | "as_operator":
            good = known_operator(text)
            if not good:
                raise Foreign(f"it calls {_shown(text)}, which a model has no use for")
        case "expr_str":
            check_expression(text)
            good = True
        case "in_spec" | "out_spec":
            leaves(parsed(text.encode(), key))
            good = True
        case "type":  # of a device
            if text != "cpu":
                raise Foreign(f"it was exported on {_shown(text)}: move model and example to the CPU, and export again")
            good = True
        case "as_string" | "as_strings" | "torch_version" | "verifiers":
            good = len(text) <= 1024 and text.isprintable()
        case "as_float" | "as_floats" | "as_float_lists" | "real" | "imag":
            good = text in ("Infinity", "-Infinity", "NaN")
        case _:
            good = False
    if not good:
        raise Foreign(f"{key} is {_shown(text)}")


def known_operator(target: str) -> bool:
    """True for an operator that computes something and reaches nothing outside."""
    if target in _TARGETS:
        return True
    found = _OPERATOR.fullmatch(target)
    if found is None:
        return False
    namespace, name, _ = found.groups()
    return namespace in _NAMESPACES and name not in _OUTSIDE and (not name.startswith("__") or name in _DUNDERS)


def check_expression(text: str) -> None:
    """Refuse an expression of a size that is more than arithmetic on symbols. Raises Foreign."""
    if len(text) > _MAX_EXPRESSION or "\n" in text:
        raise Foreign(f"an expression of {len(text)} characters: {_shown(text)}")
    try:
        tree = ast.parse(text, mode="eval").body
        bad = _bad_part(tree)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Foreign(f"{_shown(text)} is not an expression ({type(error).__name__})") from error
    if bad:
        raise Foreign(f"the expression {_shown(text)} has {bad} in it, which is no arithmetic on sizes")


def _bad_part(node: ast.expr, depth: int = 0) -> str | None:
    if depth > _MAX_DEPTH:
        return "too many levels"
    match node:
        case ast.Constant(value=bool()):
            return None
        case ast.Constant(value=int(number)):
            return None if abs(number) < 1 << 63 else f"{number}"
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return _bad_part(operand, depth + 1)
        case ast.Name(id="true" | "false"):
            return None
        case ast.Call(func=ast.Name(id="Symbol"), args=[ast.Constant(value=str(name))], keywords=keywords):
            plain = all(
                k.arg in _ASSUMPTIONS and isinstance(k.value, ast.Constant) and isinstance(k.value.value, bool)
                for k in keywords
            )
            return None if plain and IDENTIFIER.fullmatch(name) else "an odd symbol"
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS and name != "Symbol":
            if name == "Pow" and not (len(args) == 2 and _small(args[1])):
                return "an exponent that is no small number"
            return next((bad for arg in args if (bad := _bad_part(arg, depth + 1))), None)
    return f"{ast.unparse(node)[:60]!r}"


def _small(node: ast.expr) -> bool:
    match node:
        case ast.Call(func=ast.Name(id="Integer"), args=[inner], keywords=[]):
            return _small(inner)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return _small(operand)
        case ast.Constant(value=int(number)):
            return abs(number) <= _MAX_EXPONENT
    return False


def leaves(spec: Any) -> Any:
    """What a treespec says, as nested lists and dicts of None. Raises Foreign for classes of their own."""
    if not (isinstance(spec, list) and len(spec) == 2 and spec[0] == 1):
        raise Foreign("inputs or outputs are described in a way that is not known here")
    return _leaves(spec[1], 0)


def _leaves(node: Any, depth: int) -> Any:
    if depth > _MAX_DEPTH or not isinstance(node, dict) or set(node) != {"type", "context", "children_spec"}:
        raise Foreign("inputs or outputs are described in a way that is not known here")
    kind, children = node["type"], node["children_spec"]
    if kind is None and node["context"] is None and children == []:
        return None
    if kind not in _CONTAINERS or not isinstance(children, list) or not isinstance(node["context"], str):
        raise Foreign(
            f"inputs or outputs are of the type {_shown(str(kind))}: plain tensors, tuples, lists and dicts are needed"
        )
    inside = [_leaves(child, depth + 1) for child in children]
    context = parsed(node["context"].encode(), "the context of a treespec")
    if kind != "builtins.dict":
        if context is not None:
            raise Foreign("inputs or outputs are described in a way that is not known here")
        return inside
    if not isinstance(context, list) or len(context) != len(inside) or len(set(map(str, context))) != len(context):
        raise Foreign("a dict among inputs or outputs has keys that do not fit")
    if not all(isinstance(key, str) and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", key) for key in context):
        raise Foreign("a dict among inputs or outputs has keys that are no plain names")
    return dict(zip(context, inside, strict=True))


def _shown(text: str) -> str:
    return repr(text if len(text) <= 120 else f"{text[:120]}…")

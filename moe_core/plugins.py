"""Discovery: finds plugins by entry point, loads each in isolation, and keeps what each one registered.

`import moe_core` runs none of this; the first build or listing does, once. pluggy's own entry-point loader isn't used:
there, one plugin that fails to import ends the loop, and the second of two equal names vanishes without a word.
"""

from __future__ import annotations

import difflib
import enum
import functools
import importlib
import importlib.metadata
import inspect
import os
import re
import traceback
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import attrs
import pluggy

from moe_core import hookspecs
from moe_core.declared import (
    CAPABILITIES_PAGE,
    FUNCTION,
    HOOKS_PAGE,
    NAME,
    PRIORITY_BY_ROWS,
    STABILITY_PAGE,
    Rule,
    instance_of,
    optional,
)
from moe_core.errors import PluginError, UnsupportedError
from moe_core.hookspecs import ENTRY_POINT_GROUP, PLUGIN_API
from moe_core.interfaces import BackendFactory, Candidate, RouterFactory, RunnerFactory, always_available
from moe_core.quant import QuantMethod
from moe_core.types import Availability, DispatchCapabilities, ExpertsCapabilities, Priority

BUILTIN_MODULES = ("moe_core.builtin", "moe_core.route", "moe_core.runner", "moe_core.two_batch")
"""What ships with the core enters by the same hooks as everybody else: named here, imported by nobody."""


_RECORDS: dict[str, type] = {record.__name__: record for record in (DispatchCapabilities, ExpertsCapabilities)}

_NOT_THE_PLUGIN = {"moe_core", "pluggy", "importlib", "attr", "attrs"}
"""Packages whose lines stand between the loader and a plugin's, or after them."""


class PluginStatus(str, enum.Enum):
    """What became of a plugin."""

    LOADED = "loaded"
    FAILED = "failed"
    DISABLED = "disabled"
    INCOMPATIBLE = "incompatible"
    DUPLICATE = "duplicate"

    def __str__(self) -> str:
        return self.value


@attrs.define
class PluginRecord:
    """One plugin that was found.

    Attributes:
        name: its entry point's name, or the module's name for built-ins and plugins registered in process.
        distribution, version: of the package that brought it.
        module: what the entry point names.
        status, reason: what became of it, and why, in one line with what to do; "" when loaded.
        registers: what it registered, as "dispatch:local", "experts:torch", ….
        error: the exception behind `failed`.
    """

    name: str
    distribution: str
    version: str
    module: str
    status: PluginStatus = PluginStatus.LOADED
    reason: str = ""
    registers: tuple[str, ...] = ()
    error: BaseException | None = attrs.field(default=None, repr=False)

    @property
    def label(self) -> str:
        return f"{self.distribution} {self.version}".rstrip()


@attrs.frozen
class QuantMethodEntry:
    """A registered quantization method: `factory()` makes one; `from_checkpoint_config` claims or declines a format."""

    scheme: str
    plugin: str
    factory: Callable[[], QuantMethod]
    from_checkpoint_config: Callable[[Mapping[str, Any]], QuantMethod | str] | None = None


_KINDS: dict[str, tuple[str, str | None]] = {
    "dispatch": ("dispatch", "moe-"),
    "experts": ("experts", "moe-experts-"),
    "quant_methods": ("quantization scheme", "moe-quant-"),
    "routers": ("router", None),
    "runners": ("runner", None),
}
"""Kind → what people call one, and how a package that brings one is named by convention."""


@attrs.define
class Registry:
    """Everything that loaded plugins registered, by kind and name."""

    plugins: list[PluginRecord] = attrs.field(factory=list)
    dispatch: dict[str, Candidate[DispatchCapabilities]] = attrs.field(factory=dict)
    experts: dict[str, Candidate[ExpertsCapabilities]] = attrs.field(factory=dict)
    quant_methods: dict[str, QuantMethodEntry] = attrs.field(factory=dict)
    routers: dict[str, RouterFactory] = attrs.field(factory=dict)
    runners: dict[str, RunnerFactory] = attrs.field(factory=dict)

    def not_loaded(self) -> list[str]:
        """One sentence for each plugin that was found and can't be used, with the reason. (Disabled ones could.)"""
        return [
            f"plugin {record.name} ({record.label}) is {record.status}: {record.reason}"
            for record in self.plugins
            if record.status not in (PluginStatus.LOADED, PluginStatus.DISABLED)
        ]

    def find(self, kind: str, name: str) -> Any:
        """The entry `name` of a kind ("dispatch", "experts", "quant_methods", "routers", "runners").

        Raises:
            UnsupportedError: there is none. If a plugin of that name is installed but could not be loaded, its own
                error is the cause.
        """
        entries: dict[str, Any] = getattr(self, kind)
        noun, prefix = _KINDS[kind]
        if name in entries:
            return entries[name]
        for record in self.plugins:
            if record.name == name and record.status is not PluginStatus.LOADED:
                raise UnsupportedError(
                    f"{noun} {name!r}: the plugin {record.name!r} ({record.label}) is {record.status}: {record.reason}"
                ) from record.error
        known = ", ".join(sorted(entries)) or "none"
        text = f"unknown {noun} {name!r}; known here: {known}."
        if close := difflib.get_close_matches(name, entries, n=1):
            text += f" Did you mean {close[0]!r}?"
        elif prefix is not None:
            text += (
                f" More come with plugins, which are packages named {prefix}…: try pip install "
                f"{prefix}{name.replace('_', '-')}, and see what is installed with moe-core plugins"
            )
        raise UnsupportedError(text)


_HOOKS = tuple(name for name in vars(hookspecs) if name.startswith("moe_core_register_"))


@attrs.define
class _Registrar:
    """The `register` callables of one plugin. They collect; `commit` enters all of it, or nothing."""

    record: PluginRecord
    registry: Registry
    entries: list[tuple[str, str, Any]] = attrs.field(factory=list)
    hook: str = ""
    """The one that runs, for messages."""

    @property
    def where(self) -> str:
        return f"{self.record.module}, hook {self.hook}" if self.hook else self.record.module

    def _add(self, kind: str, shown: str, name: str, entry: Any, *arguments: tuple[str, Any, Rule]) -> None:
        """Take one entry, if its name and `arguments` (each with what it must be) are right."""
        complaint = NAME.complaint("name", name, HOOKS_PAGE)
        named = "" if complaint else f" {name!r}"
        for argument, value, rule in arguments:
            complaint = complaint or rule.complaint(argument, value, HOOKS_PAGE)
        if complaint:
            raise PluginError(f"{self.where}, {shown}{named}: {complaint}")
        if name in getattr(self.registry, kind) or (kind, name) in {(k, n) for k, n, _ in self.entries}:
            other = getattr(getattr(self.registry, kind).get(name), "plugin", "another plugin")
            raise PluginError(
                f"{self.where}: registers {shown} {name!r}, which {other} has registered already; "
                "choose another name, or block one of the two with MOE_CORE_DISABLE_PLUGINS"
            )
        self.entries.append((kind, name, entry))
        self.record.registers += (f"{shown}:{name}",)

    def _backend(self, kind: str, capabilities_type: type) -> Callable[..., None]:
        declaration = instance_of(capabilities_type, f"a moe_core.{capabilities_type.__name__}")

        def register(
            name: str,
            factory: BackendFactory,
            capabilities: Any,
            probe: Callable[[], Availability] = always_available,
            priority: Priority = 0,
        ) -> None:
            candidate: Candidate[Any] = Candidate(
                name=name,
                plugin=self.record.label,
                factory=factory,
                capabilities=capabilities,
                probe=probe,
                priority=priority,
            )
            self._add(
                kind,
                kind,
                name,
                candidate,
                ("factory", factory, FUNCTION),
                ("capabilities", capabilities, declaration),
                ("probe", probe, FUNCTION),
                ("priority", priority, PRIORITY_BY_ROWS),
            )

        return register

    def _quant_method(self) -> Callable[..., None]:
        def register(
            scheme: str,
            factory: Callable[[], QuantMethod],
            from_checkpoint_config: Callable[[Mapping[str, Any]], QuantMethod | str] | None = None,
        ) -> None:
            entry = QuantMethodEntry(scheme, self.record.label, factory, from_checkpoint_config)
            claims = ("from_checkpoint_config", from_checkpoint_config, optional(FUNCTION))
            self._add("quant_methods", "scheme", scheme, entry, ("factory", factory, FUNCTION), claims)

        return register

    def _maker(self, kind: str, shown: str) -> Callable[..., None]:
        def register(name: str, factory: Callable[..., Any]) -> None:
            self._add(kind, shown, name, factory, ("factory", factory, FUNCTION))

        return register

    def call_hooks(self, manager: pluggy.PluginManager, module: ModuleType) -> None:
        """Call this plugin's hooks, and no other's, each with the `register` of its kind."""
        registers: dict[str, Callable[..., None]] = {
            "moe_core_register_prepare_finalize": self._backend("dispatch", DispatchCapabilities),
            "moe_core_register_experts": self._backend("experts", ExpertsCapabilities),
            "moe_core_register_quant_methods": self._quant_method(),
            "moe_core_register_routers": self._maker("routers", "router"),
            "moe_core_register_runners": self._maker("runners", "runner"),
        }
        others = [plugin for plugin in manager.get_plugins() if plugin is not module]
        for self.hook, register in registers.items():
            register.__qualname__ = "register"  # what Python says of a call that doesn't fit
            manager.subset_hook_caller(self.hook, remove_plugins=others)(register=register)

    def commit(self) -> None:
        for kind, name, entry in self.entries:
            getattr(self.registry, kind)[name] = entry

    def withdraw(self) -> None:
        for kind, name, _ in self.entries:
            del getattr(self.registry, kind)[name]
        self.registry.plugins.remove(self.record)


def _names_in(variable: str) -> set[str] | None:
    value = os.environ.get(variable)
    return None if value is None else {name.strip() for name in value.split(",") if name.strip()}


def _api_complaint(record: PluginRecord, module: ModuleType) -> str:
    """Why the plugin's API version doesn't fit, or ""."""
    expected = f"expected a pair of ints such as {PLUGIN_API} ({STABILITY_PAGE})"
    if not hasattr(module, "moe_core_api"):
        return f"{record.module} does not set moe_core_api; {expected}"
    api = module.moe_core_api
    if not (isinstance(api, tuple) and len(api) == 2 and all(isinstance(part, int) for part in api)):
        return f"{record.module} sets moe_core_api = {api!r}; {expected}"
    if api[0] == PLUGIN_API[0] and api[1] <= PLUGIN_API[1]:
        return ""
    newer = "moe-core" if api > PLUGIN_API else record.distribution
    return (
        f"{record.module} declares moe_core_api = {api}, this moe-core speaks {PLUGIN_API}; "
        f"try pip install --upgrade {newer} ({STABILITY_PAGE})"
    )


def _hook_complaint(record: PluginRecord, manager: pluggy.PluginManager, module: ModuleType) -> str:
    """What is wrong with the functions that are meant as hooks, or "": pluggy would pass over most of it in silence."""
    for name in dir(module):
        function = getattr(module, name)
        options = manager.parse_hookimpl_opts(module, name)
        hook = (options and options.get("specname")) or name
        if not callable(function) or not (options or name.startswith("moe_core_register_")):
            continue
        if hook not in _HOOKS:
            # a backend that is called dispatch everywhere else comes through the hook of its interface's name
            close = difflib.get_close_matches(hook.replace("dispatch", "prepare_finalize"), _HOOKS, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            return (
                f"{record.module} defines {hook}, which is no hook; {hint}There are {', '.join(_HOOKS)} ({HOOKS_PAGE})"
            )
        if options is None:
            return (
                f"{record.module} defines {hook} without @moe_core.hookimpl; put it above the function ({HOOKS_PAGE})"
            )
        parameters = inspect.signature(function).parameters.values()
        if (taken := [item.name for item in parameters if item.default is item.empty]) != ["register"]:
            return f"{record.module} defines {hook}({', '.join(taken)}); expected {hook}(register) ({HOOKS_PAGE})"
    return ""


class PluginLoader:
    """Fills a `Registry`: built-ins first, then entry points sorted by (distribution, name)."""

    def __init__(self) -> None:
        self.registry = Registry()
        self._manager = pluggy.PluginManager("moe_core")
        self._manager.add_hookspecs(hookspecs)
        self._in_process: dict[str, tuple[_Registrar, ModuleType]] = {}

    def load_all(self) -> Registry:
        version = importlib.import_module("moe_core").__version__
        for module_name in BUILTIN_MODULES:
            name = module_name.rpartition(".")[2]
            record = PluginRecord(name, "moe-core", version, module_name)
            self._load(record, functools.partial(importlib.import_module, module_name))
            if record.error is not None:  # ours: without it nothing works, and it is our mistake
                raise record.error
        only, blocked = _names_in("MOE_CORE_PLUGINS"), _names_in("MOE_CORE_DISABLE_PLUGINS") or set()
        seen: dict[str, str] = {}
        for entry_point in _entry_points():
            dist = entry_point.dist
            record = PluginRecord(
                entry_point.name,
                dist.name if dist else "unknown distribution",
                dist.version if dist else "",
                entry_point.value,
            )
            if entry_point.name in seen:
                record.status = PluginStatus.DUPLICATE
                record.reason = (
                    f"{seen[entry_point.name]} brings an entry point {entry_point.name!r} too and was found first; "
                    f"uninstall one of the two: pip uninstall {record.distribution}"
                )
                self.registry.plugins.append(record)
                continue
            seen[entry_point.name] = record.label
            if entry_point.name in blocked or (only is not None and entry_point.name not in only):
                record.status = PluginStatus.DISABLED
                variable = "MOE_CORE_DISABLE_PLUGINS" if entry_point.name in blocked else "MOE_CORE_PLUGINS"
                record.reason = f"by {variable}={os.environ[variable]}; change or unset the variable to load it"
                self.registry.plugins.append(record)
                continue
            self._load(record, entry_point.load)
        return self.registry

    def register(self, module: ModuleType, name: str | None = None) -> PluginRecord:
        """Load a module that is at hand already; its failure is raised, not recorded only."""
        name = name or module.__name__
        if any(record.name == name for record in self.registry.plugins):
            raise PluginError(f"a plugin named {name!r} is registered already; give register_plugin another name")
        record = PluginRecord(name, "in process", "", module.__name__)
        registrar = self._load(record, lambda: module)
        if record.status is not PluginStatus.LOADED:
            self.registry.plugins.remove(record)
            raise PluginError(f"plugin {name!r}: {record.reason}") from record.error
        self._in_process[name] = (registrar, module)
        return record

    def unregister(self, plugin: ModuleType | str) -> None:
        """Undo `register`."""
        names = [name for name, (_, module) in self._in_process.items() if plugin in (name, module)]
        if not names:
            shown = plugin if isinstance(plugin, str) else getattr(plugin, "__name__", plugin)
            known = ", ".join(self._in_process) or "none"
            raise PluginError(f"no plugin {shown!r} was registered in this process; registered so: {known}")
        registrar, module = self._in_process.pop(names[0])
        self._manager.unregister(module)
        registrar.withdraw()

    def _load(self, record: PluginRecord, load: Callable[[], ModuleType]) -> _Registrar:
        self.registry.plugins.append(record)
        registrar = _Registrar(record, self.registry)
        module: ModuleType | None = None
        try:
            module = load()
            if complaint := _api_complaint(record, module):
                record.status, record.reason = PluginStatus.INCOMPATIBLE, complaint
                return registrar
            if complaint := _hook_complaint(record, self._manager, module):
                raise PluginError(complaint)
            self._manager.register(module, name=f"{record.distribution}:{record.name}")
            registrar.call_hooks(self._manager, module)
            registrar.commit()
        except (Exception, SystemExit) as error:  # noqa: BLE001 - isolation: whatever a plugin does, the others load
            record.status, record.error, record.registers = PluginStatus.FAILED, error, ()
            record.reason = _failure(registrar, error)
            if module is not None and self._manager.is_registered(module):
                self._manager.unregister(module)
        return registrar


def _failure(registrar: _Registrar, error: BaseException) -> str:
    """Who raised what, at which line, and what to do, after the last "; "."""
    if isinstance(error, PluginError):
        return str(error)
    text = str(error).splitlines()[0] if str(error) else ""
    says = f"{registrar.where} raised {type(error).__name__}{_place(registrar.record, error)}: {text}"
    if isinstance(error, (ImportError, SyntaxError)):
        return f"{says}; reinstall or remove {registrar.record.distribution}"
    return says + _call_hint(registrar.hook, text)


def _place(record: PluginRecord, error: BaseException) -> str:
    """The last line of the plugin that ran, else of whom it called, to be put behind the error's name; or ""."""
    frames = [(frame.f_globals.get("__name__", ""), frame.f_code.co_filename, line)
              for frame, line in traceback.walk_tb(error.__traceback__)]  # fmt: skip
    foreign = [item for item in frames if item[0].partition(".")[0] not in _NOT_THE_PLUGIN and item[1][:1] != "<"]
    own = [item for item in foreign if item[0].partition(".")[0] == record.module.partition(".")[0]]
    return f" at {(own or foreign)[-1][1]}:{(own or foreign)[-1][2]}" if foreign else ""


def _call_hint(hook: str, text: str) -> str:
    """For a call of a capability record or of `register` with the wrong arguments: those that it takes."""
    called = re.match(r"(?:(\w+)\.__init__|register)\(\) ", text)
    if called is None or (called[1] and called[1] not in _RECORDS):
        return ""
    if called[1] is None:
        return hook and f"; see what register takes in {hook} ({HOOKS_PAGE})"
    fields = [field.name for field in attrs.fields(_RECORDS[called[1]])]
    unknown = re.search(r"unexpected keyword argument '(\w+)'", text)
    close = difflib.get_close_matches(unknown[1], fields, n=1) if unknown else []
    hint = f"did you mean {close[0]}?" if close else f"its fields are {', '.join(fields)}"
    return f"; {hint} ({CAPABILITIES_PAGE})"


def _entry_points() -> list[importlib.metadata.EntryPoint]:
    found = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    return sorted(found, key=lambda item: (item.dist.name if item.dist else "", item.name))


_loader: PluginLoader | None = None


def _loaded() -> PluginLoader:
    global _loader  # one registry per process, filled on first use
    if _loader is None:
        loader = PluginLoader()
        loader.load_all()
        _loader = loader
    return _loader


def registry() -> Registry:
    """Everything that is registered in this process; the first call runs discovery."""
    return _loaded().registry


def register_plugin(module: ModuleType, name: str | None = None) -> PluginRecord:
    """Register a plugin module in this process, without packaging (for tests and notebooks).

    Args:
        module: as an entry point would name it.
        name: what listings call it; None: the module's name.

    Raises:
        PluginError: it does not load, or the name is taken.
    """
    return _loaded().register(module, name)


def unregister_plugin(plugin: ModuleType | str) -> None:
    """Take back what `register_plugin` did. Plans that were made keep what they chose.

    Args:
        plugin: the module that was registered, or the name that it got.

    Raises:
        PluginError: it is not registered in this process.
    """
    _loaded().unregister(plugin)

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
import os
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import attrs
import pluggy

from moe_core import hookspecs
from moe_core.errors import PluginError, UnsupportedError
from moe_core.hookspecs import ENTRY_POINT_GROUP, PLUGIN_API
from moe_core.interfaces import BackendFactory, Candidate, RouterFactory, RunnerFactory, always_available
from moe_core.quant import QuantMethod
from moe_core.types import Availability, DispatchCapabilities, ExpertsCapabilities, Priority

BUILTIN_MODULES = ("moe_core.builtin", "moe_core.route", "moe_core.runner", "moe_core.two_batch")
"""What ships with the core enters by the same hooks as everybody else: named here, imported by nobody."""


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


@attrs.define
class _Registrar:
    """The `register` callables of one plugin. They collect; `commit` enters all of it, or nothing."""

    record: PluginRecord
    registry: Registry
    entries: list[tuple[str, str, Any]] = attrs.field(factory=list)

    def _add(self, kind: str, shown: str, name: str, entry: Any) -> None:
        if not isinstance(name, str) or not name:
            raise PluginError(f"plugin {self.record.name!r} registered {shown} under the name {name!r}; expected a str")
        if name in getattr(self.registry, kind) or (kind, name) in {(k, n) for k, n, _ in self.entries}:
            other = getattr(getattr(self.registry, kind).get(name), "plugin", "another plugin")
            raise PluginError(
                f"plugin {self.record.name!r} registers {shown} {name!r}, which {other} has registered already; "
                "choose another name, or block one of the two with MOE_CORE_DISABLE_PLUGINS"
            )
        self.entries.append((kind, name, entry))
        self.record.registers += (f"{shown}:{name}",)

    def _backend(self, kind: str, capabilities_type: type) -> Callable[..., None]:
        def register(
            name: str,
            factory: BackendFactory,
            capabilities: Any,
            probe: Callable[[], Availability] = always_available,
            priority: Priority = 0,
        ) -> None:
            if not isinstance(capabilities, capabilities_type):
                raise PluginError(
                    f"plugin {self.record.name!r} registered {kind} {name!r} with capabilities = {capabilities!r}; "
                    f"expected a moe_core.{capabilities_type.__name__}"
                )
            candidate: Candidate[Any] = Candidate(
                name=name,
                plugin=self.record.label,
                factory=factory,
                capabilities=capabilities,
                probe=probe,
                priority=priority,
            )
            self._add(kind, kind, name, candidate)

        return register

    def _quant_method(
        self,
        scheme: str,
        factory: Callable[[], QuantMethod],
        from_checkpoint_config: Callable[[Mapping[str, Any]], QuantMethod | str] | None = None,
    ) -> None:
        entry = QuantMethodEntry(scheme, self.record.label, factory, from_checkpoint_config)
        self._add("quant_methods", "scheme", scheme, entry)

    def call_hooks(self, manager: pluggy.PluginManager, module: ModuleType) -> None:
        """Call this plugin's hooks, and no other's, each with the `register` of its kind."""
        registers: dict[str, Callable[..., None]] = {
            "moe_core_register_prepare_finalize": self._backend("dispatch", DispatchCapabilities),
            "moe_core_register_experts": self._backend("experts", ExpertsCapabilities),
            "moe_core_register_quant_methods": self._quant_method,
            "moe_core_register_routers": lambda name, factory: self._add("routers", "router", name, factory),
            "moe_core_register_runners": lambda name, factory: self._add("runners", "runner", name, factory),
        }
        others = [plugin for plugin in manager.get_plugins() if plugin is not module]
        for hook, register in registers.items():
            manager.subset_hook_caller(hook, remove_plugins=others)(register=register)

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
    api = getattr(module, "moe_core_api", None)
    shown = ".".join(map(str, PLUGIN_API))
    if not (isinstance(api, tuple) and len(api) == 2 and all(isinstance(part, int) for part in api)):
        return f"{record.module} sets moe_core_api = {api!r}; expected a pair of ints such as {PLUGIN_API}"
    if api[0] == PLUGIN_API[0] and api[1] <= PLUGIN_API[1]:
        return ""
    wanted = ".".join(map(str, api))
    newer = "moe-core" if api > PLUGIN_API else record.distribution
    return f"it is built for plugin API {wanted}, this moe-core speaks {shown}; try pip install --upgrade {newer}"


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

    def unregister(self, name: str) -> None:
        """Undo `register`."""
        if name not in self._in_process:
            known = ", ".join(self._in_process) or "none"
            raise PluginError(f"no plugin {name!r} was registered in this process; registered so: {known}")
        registrar, module = self._in_process.pop(name)
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
            self._manager.register(module, name=f"{record.distribution}:{record.name}")
            self._manager.check_pending()  # a misspelt hook would else be accepted and never called
            registrar.call_hooks(self._manager, module)
            registrar.commit()
        except (Exception, SystemExit) as error:  # noqa: BLE001 - isolation: whatever a plugin does, the others load
            record.status, record.error, record.registers = PluginStatus.FAILED, error, ()
            record.reason = _failure(record, error)
            if module is not None and self._manager.is_registered(module):
                self._manager.unregister(module)
        return registrar


def _failure(record: PluginRecord, error: BaseException) -> str:
    if isinstance(error, PluginError):
        return str(error)
    if isinstance(error, pluggy.PluginValidationError):
        hooks = ", ".join(name for name in vars(hookspecs) if name.startswith("moe_core_register"))
        return f"plugin {record.name!r} defines a hook that does not exist ({error}); the hooks are {hooks}"
    text = str(error).splitlines()[0] if str(error) else ""
    return f"{record.module} raised {type(error).__name__}: {text}; reinstall or remove {record.distribution}"


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

    Raises:
        PluginError: it does not load, or the name is taken.
    """
    return _loaded().register(module, name)


def unregister_plugin(name: str) -> None:
    """Take back what `register_plugin` did. Plans that were made keep what they chose."""
    _loaded().unregister(name)

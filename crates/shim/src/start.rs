//! What happens when the library is loaded.

#![allow(unsafe_code, reason = "a constructor is a pointer in a section that the loader runs through")]

/// The loader calls this before the constructors of the program.
// SAFETY: needed because nothing else runs before a program's own constructors, which may open devices already. The section
// holds pointers to C functions that take what they like of (argc, argv, envp).
#[unsafe(link_section = ".init_array")]
#[used]
static START: extern "C" fn() = start;

extern "C" fn start() {
    crate::errno::preserved(|| {
        // Before a child of vfork can be the first to ask.
        crate::owner::is_caller();
        crate::configuration::apply();
        // SAFETY: needed because fork may be called by libc itself. The handlers are functions of this library, which is never
        // unloaded.
        unsafe { libc::pthread_atfork(Some(prepare), Some(parent), Some(child)) };
    });
}

/// The loader calls this when the process exits.
// SAFETY: needed because what is made outside of the process has to be removed. As above.
#[unsafe(link_section = ".fini_array")]
#[used]
static END: extern "C" fn() = crate::tree::remove;

extern "C" fn prepare() {
    crate::share::prepare();
}

extern "C" fn parent() {
    crate::share::parent();
}

extern "C" fn child() {
    crate::errno::preserved(crate::owner::is_caller);
    crate::registers::wanted::child();
    crate::share::child();
}

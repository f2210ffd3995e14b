# Round trips between the modes, with nothing in them but the trips.

    .text

.macro code name
    .globl \name
\name:
.endm

# An event entry whose handler of user faults skips the instruction, of three bytes, and returns. RCX and R11 are the
# PVCS's business.
    .balign 64
code bench_event_entry
    mov rcx, gs:[{L_PVCS}]
    add qword ptr [rcx + {P_RIP}], 3
    jmp retu

# R12 hypercalls IRQ_WIN.
code s_bench_hypercall
    mov eax, 0x17088201
    syscall
    dec r12
    jnz s_bench_hypercall
    jmp snippet_end

    .section .user, "ax", @progbits

# RBX system calls, then a breakpoint.
code u_bench_syscall
    syscall
    dec rbx
    jnz u_bench_syscall
    int3

# RBX page faults, then a system call.
code u_bench_fault
    mov rax, [rdi]                  # three bytes
    dec rbx
    jnz u_bench_fault
    syscall

    .text
    .purgem code

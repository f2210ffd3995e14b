# Where events enter, and how the kernel runs a piece of code and gets the processor back.
#
# Offsets in Local (L_*), Registers (R_*) and the PVCS (P_*) come from the Rust types. GS is Local in supervisor mode.

    .text

# ---- The entry points: MSR_PVM_EVENT_ENTRY, + 256, + 512 ----
# None of the instructions before PUSHFQ changes a flag: what the event loaded is to be seen.

    .balign 64
    .globl event_entry
event_entry:
    pushfq
    push 0
    jmp from_user

    .org event_entry + 256
# RSP points to the frame that the hypervisor has pushed.
    pushfq
    push 0
    jmp supervisor_common

    .org event_entry + 512
# The interrupted state is in the PVCS. The frame that ERETS wants is built here; RCX and R11 are free.
    mov gs:[{L_ENTRY_RCX}], rcx
    mov gs:[{L_ENTRY_R11}], r11
    pushfq
    pop qword ptr gs:[{L_ENTRY_FLAGS}]
    mov rcx, gs:[{L_PVCS}]
    push qword ptr [rcx + {P_R11}]
    push qword ptr [rcx + {P_RCX}]
    push 0
    push qword ptr [rcx + {P_RSP}]
    mov r11d, [rcx + {P_EFLAGS}]
    push r11
    push 0
    push qword ptr [rcx + {P_RIP}]
    mov r11d, [rcx + {P_VECTOR}]
    shl r11, 32
    push r11
    push qword ptr gs:[{L_ENTRY_FLAGS}]
    push 1
    mov rcx, gs:[{L_ENTRY_RCX}]
    mov r11, gs:[{L_ENTRY_R11}]

# On the stack: kind, RFLAGS at entry, the frame.
supervisor_common:
    push rax
    push rbx
    push rcx
    push rdx
    push rsi
    push rdi
    push rbp
    push r8
    push r9
    push r10
    push r11
    push r12
    push r13
    push r14
    push r15
    mov rdi, rsp
    mov rbp, rsp
    sub rsp, 512
    and rsp, -16
    fxsave64 [rsp]
    cld
    call {supervisor_event}
    fxrstor64 [rsp]
    mov rsp, rbp
    pop r15
    pop r14
    pop r13
    pop r12
    pop r11
    pop r10
    pop r9
    pop r8
    pop rbp
    pop rdi
    pop rsi
    pop rdx
    pop rcx
    pop rbx
    pop rax
    lea rsp, [rsp + 16]
    .globl rets
rets:
    syscall                         # MSR_PVM_RETS_RIP

# ---- User mode: run_user(registers) returns what brought the processor back: 0 event, 1 SYSCALL ----

    .globl syscall_entry
syscall_entry:
    pushfq
    push 1
# RSP was loaded from MSR_PVM_SUPERVISOR_RSP: it is what it was at ERETU, if the hypervisor did its work. On the
# stack: kind, RFLAGS at entry, the pointer to Registers, the callee-saved registers.
from_user:
    push rax
    mov rax, [rsp + 24]
    mov [rax + {R_RBX}], rbx
    mov [rax + {R_RCX}], rcx
    mov [rax + {R_RDX}], rdx
    mov [rax + {R_RSI}], rsi
    mov [rax + {R_RDI}], rdi
    mov [rax + {R_RBP}], rbp
    mov [rax + {R_R8}], r8
    mov [rax + {R_R9}], r9
    mov [rax + {R_R10}], r10
    mov [rax + {R_R11}], r11
    mov [rax + {R_R12}], r12
    mov [rax + {R_R13}], r13
    mov [rax + {R_R14}], r14
    mov [rax + {R_R15}], r15
    lea rbx, [rsp + 24]
    mov [rax + {R_RSP}], rbx        # RSP at entry
    pop rbx
    mov [rax + {R_RAX}], rbx
    mov rbx, [rsp + 8]
    mov [rax + {R_RFLAGS}], rbx     # RFLAGS at entry
    lea rbx, [rip + event_entry]
    mov [rax + {R_RIP}], rbx        # RIP at entry
    lea rdx, [rip + syscall_entry]
    pop rax
    test rax, rax
    jz 1f
    mov rbx, [rsp + 8]
    mov [rbx + {R_RIP}], rdx
1:  add rsp, 16
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    cld
    ret

    .globl run_user
run_user:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    push rdi
    mov [rdi + {R_EXIT_RSP}], rsp   # for who wants to compare
    mov rax, [rdi + {R_RAX}]
    mov rbx, [rdi + {R_RBX}]
    mov rdx, [rdi + {R_RDX}]
    mov rsi, [rdi + {R_RSI}]
    mov rbp, [rdi + {R_RBP}]
    mov r8, [rdi + {R_R8}]
    mov r9, [rdi + {R_R9}]
    mov r10, [rdi + {R_R10}]
    mov r12, [rdi + {R_R12}]
    mov r13, [rdi + {R_R13}]
    mov r14, [rdi + {R_R14}]
    mov r15, [rdi + {R_R15}]
    mov rdi, [rdi + {R_RDI}]
    .globl retu
retu:
    syscall                         # MSR_PVM_RETU_RIP

# ---- Supervisor mode: run_supervisor(registers) returns 0 if the code came to its end, 1 if it was given up ----
# Code that is run this way may use all registers, RSP too, and ends with `jmp snippet_end`.

    .globl run_supervisor
run_supervisor:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    mov gs:[{L_REGISTERS}], rdi
    mov gs:[{L_RESUME_RSP}], rsp
    mov rax, [rdi + {R_RIP}]
    mov gs:[{L_TARGET}], rax
    mov rax, [rdi + {R_RSP}]
    test rax, rax
    cmovnz rsp, rax
    mov rax, [rdi + {R_RAX}]
    mov rbx, [rdi + {R_RBX}]
    mov rcx, [rdi + {R_RCX}]
    mov rdx, [rdi + {R_RDX}]
    mov rsi, [rdi + {R_RSI}]
    mov rbp, [rdi + {R_RBP}]
    mov r8, [rdi + {R_R8}]
    mov r9, [rdi + {R_R9}]
    mov r10, [rdi + {R_R10}]
    mov r11, [rdi + {R_R11}]
    mov r12, [rdi + {R_R12}]
    mov r13, [rdi + {R_R13}]
    mov r14, [rdi + {R_R14}]
    mov r15, [rdi + {R_R15}]
    mov rdi, [rdi + {R_RDI}]
    jmp qword ptr gs:[{L_TARGET}]

    .globl snippet_end
snippet_end:
    mov gs:[{L_ENTRY_RCX}], rax
    mov rax, gs:[{L_REGISTERS}]
    mov [rax + {R_RBX}], rbx
    mov [rax + {R_RCX}], rcx
    mov [rax + {R_RDX}], rdx
    mov [rax + {R_RSI}], rsi
    mov [rax + {R_RDI}], rdi
    mov [rax + {R_RBP}], rbp
    mov [rax + {R_RSP}], rsp
    mov [rax + {R_R8}], r8
    mov [rax + {R_R9}], r9
    mov [rax + {R_R10}], r10
    mov [rax + {R_R11}], r11
    mov [rax + {R_R12}], r12
    mov [rax + {R_R13}], r13
    mov [rax + {R_R14}], r14
    mov [rax + {R_R15}], r15
    mov rsp, gs:[{L_RESUME_RSP}]
    pushfq
    pop qword ptr [rax + {R_RFLAGS}]
    mov rbx, gs:[{L_ENTRY_RCX}]
    mov [rax + {R_RAX}], rbx
    xor eax, eax
    jmp 1f

# The event handler comes here to give the code up, with RSP as run_supervisor left it.
    .globl snippet_abandoned
snippet_abandoned:
    mov eax, 1
1:  cld
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret

# ---- hypercall(number, a0, a1, a2, a3) ----

    .globl hypercall
hypercall:
    push rbx
    mov rax, rdi
    mov rbx, rsi
    mov r10, rdx
    mov rdx, rcx
    mov rsi, r8
    syscall
    pop rbx
    ret

# The user programs: they lie together in pages of their own, which are mapped into user space. A program can be
# anywhere; what it needs is in registers.

.macro code name
    .globl \name
\name:
.endm

    .section .user, "ax", @progbits

code u_syscall
    syscall
    .globl u_syscall_after
u_syscall_after:
    ud2

code u_int3
    int3
    .globl u_int3_after
u_int3_after:
    ud2

code u_int4
    int 4
    ud2

code u_int80
    int 0x80
    .globl u_int80_after
u_int80_after:
    ud2

code u_int21
    int 0x21
    ud2

code u_ud2
    ud2

code u_hlt
    hlt

code u_synthetic_cpuid
    xor eax, eax
    .byte 0x0f, 0x01, 0x3c, 0x25, 0x50, 0x56, 0x4d, 0xff, 0x0f, 0xa2
    syscall

code u_cli
    cli
    ud2

code u_sti
    sti
    ud2

code u_in
    in al, dx
    ud2

code u_rdmsr
    rdmsr
    ud2

code u_wrmsr
    wrmsr
    ud2

code u_get_cr3
    mov rax, cr3
    ud2

code u_swapgs
    swapgs
    ud2

code u_sysenter
    sysenter
    ud2

code u_divide
    xor edx, edx
    div rcx
    ud2

code u_load
    mov rax, [rdi]
    syscall

code u_store
    mov [rdi], rax
    syscall

code u_jump
    jmp rdi

code u_spin                         # until an interrupt; counts in RBX
    inc rbx
    pause
    jmp u_spin

code u_pushf                        # RAX = RFLAGS
    pushfq
    pop rax
    syscall

code u_popf                         # RFLAGS = RAX, then RAX = RFLAGS
    push rax
    popfq
    pushfq
    pop rax
    cld
    syscall

code u_step
    pushfq
    or dword ptr [rsp], 0x100
    popfq
    nop
    .globl u_stepped
u_stepped:
    ud2

code u_gsbase                       # RAX = GS base, then GS base = RDI
    rdgsbase rax
    wrgsbase rdi
    rdfsbase rbx
    syscall

code u_set_fsbase
    wrfsbase rdi
    syscall

code u_selectors                    # RAX = CS, RBX = SS
    mov eax, cs
    mov ebx, ss
    syscall

code u_keys                         # RAX = PKRU, then PKRU = RBX
    xor ecx, ecx
    rdpkru
    mov r8, rax
    mov rax, rbx
    xor edx, edx
    wrpkru
    mov rax, r8
    syscall

code u_load_fs                      # with AX; RAX = the word at FS:0
    mov fs, eax
    mov eax, fs:[0]
    syscall

code u_x87                          # divides by zero, unmasked
    fninit
    push 0x037b
    fldcw [rsp]
    fld1
    fldz
    fdivp st(1), st
    fwait
    ud2

code u_sse                          # divides by zero, unmasked; XMM0 was 1
    push 0x1d80
    ldmxcsr [rsp]
    mov eax, 0x3f800000
    movd xmm0, eax
    xorps xmm1, xmm1
    divss xmm0, xmm1
    ud2

code u_sum                          # RAX = 0.5 * RDI + 1, by SSE: user mode may use the vector units
    cvtsi2sd xmm0, rdi
    mov rax, 0x3fe0000000000000
    movq xmm1, rax
    mulsd xmm0, xmm1
    mov rax, 0x3ff0000000000000
    movq xmm1, rax
    addsd xmm0, xmm1
    cvtsd2si rax, xmm0
    syscall

code u_return                       # a function, for supervisor mode to call
    mov eax, 0x600d
    ret

    .code32

code u32_int80
    mov eax, cs
    int 0x80
    .globl u32_int80_after
u32_int80_after:
    ud2

code u32_int3
    int3

code u32_store
    mov [edi], eax
    int 0x80

code u32_sysenter
    sysenter
    ud2

code u32_load_gs                    # with AX; EAX = the word at GS:0
    mov gs, eax
    mov eax, gs:[0]
    int 0x80

code u32_load_fs
    mov fs, eax
    mov eax, fs:[4]
    int 0x80

code u32_spin
    inc ebx
    jmp u32_spin

    .code64
    .text
    .purgem code

# What the checks execute in supervisor mode, as few instructions as show the matter. Each ends with
# `jmp snippet_end` unless it cannot come that far.

    .text

.macro code name
    .globl \name
\name:
.endm

code s_nothing
    jmp snippet_end

code s_ud2
    ud2

code s_divide                       # by RCX
    xor edx, edx
    div rcx
    jmp snippet_end

code s_load                         # RAX = [RDI]
    mov rax, [rdi]
    jmp snippet_end

code s_store                        # [RDI] = RAX
    mov [rdi], rax
    .globl s_store_after
s_store_after:
    jmp snippet_end

code s_call                         # a function at RDI
    call rdi
    jmp snippet_end

code s_int3
    int3
    .globl s_int3_after
s_int3_after:
    jmp snippet_end

# INT3 with the registers as they were given and a pattern in the red zone below RSP.
code s_red_zone
    mov qword ptr [rsp - 8], rax
    mov qword ptr [rsp - 128], rbx
    int3
    mov r8, [rsp - 8]
    mov r9, [rsp - 128]
    jmp snippet_end

code s_int3_then_flags              # RAX = RFLAGS after INT3, which was with those in RAX
    push rax
    popfq
    int3
    pushfq
    pop rax
    cld
    jmp snippet_end

code s_int4
    int 4
    jmp snippet_end

code s_int21
    int 0x21
    jmp snippet_end

code s_step                         # traps behind NOP, with TF on since POPFQ
    pushfq
    or dword ptr [rsp], 0x100
    popfq
    nop
    .globl s_stepped
s_stepped:
    jmp snippet_end

code s_noncanonical
    mov rax, 0x8000000000000000
    mov rax, [rax]
    jmp snippet_end

code s_rdmsr
    rdmsr
    jmp snippet_end

code s_wrmsr
    wrmsr
    jmp snippet_end

code s_synthetic_cpuid
    .byte 0x0f, 0x01, 0x3c, 0x25, 0x50, 0x56, 0x4d, 0xff, 0x0f, 0xa2
    jmp snippet_end

code s_hypercall
    syscall
    .globl s_hypercall_after
s_hypercall_after:
    jmp snippet_end

# LOAD_GS, which is to leave GS's base alone: R8 = base, R9 = selector; R12 is the base to go on with.
code s_load_gs
    syscall
    rdgsbase r8
    mov r9d, gs
    wrgsbase r12
    jmp snippet_end

code s_pushf                        # RAX = RFLAGS
    pushfq
    pop rax
    jmp snippet_end

code s_popf                         # RFLAGS = RAX, and RAX = RFLAGS
    push rax
    popfq
    pushfq
    pop rax
    jmp snippet_end

code s_cli
    cli
    jmp snippet_end

code s_sti
    sti
    jmp snippet_end

code s_hlt
    hlt
    jmp snippet_end

code s_in                           # AL = port DX
    in al, dx
    jmp snippet_end

code s_out                          # port DX = AL
    out dx, al
    jmp snippet_end

code s_sgdt                         # at [RDI]
    sgdt [rdi]
    jmp snippet_end

code s_sidt
    sidt [rdi]
    jmp snippet_end

code s_sldt
    sldt eax
    jmp snippet_end

code s_str
    str eax
    jmp snippet_end

code s_smsw
    smsw rax
    jmp snippet_end

code s_lgdt
    lgdt [rdi]
    jmp snippet_end

code s_lidt
    lidt [rdi]
    jmp snippet_end

code s_lldt
    lldt ax
    jmp snippet_end

code s_invlpg
    invlpg [rdi]
    jmp snippet_end

code s_wbinvd
    wbinvd
    jmp snippet_end

code s_clts
    clts
    jmp snippet_end

code s_get_cr0
    mov rax, cr0
    jmp snippet_end

code s_set_cr0
    mov cr0, rax
    jmp snippet_end

code s_get_cr2
    mov rax, cr2
    jmp snippet_end

code s_set_cr2
    mov cr2, rax
    jmp snippet_end

code s_get_cr3
    mov rax, cr3
    jmp snippet_end

code s_set_cr3
    mov cr3, rax
    jmp snippet_end

code s_get_cr4
    mov rax, cr4
    jmp snippet_end

code s_set_cr4
    mov cr4, rax
    jmp snippet_end

code s_get_dr7
    mov rax, dr7
    jmp snippet_end

code s_set_dr7
    mov dr7, rax
    jmp snippet_end

code s_get_dr6
    mov rax, dr6
    jmp snippet_end

code s_set_dr6
    mov dr6, rax
    jmp snippet_end

code s_get_dr0
    mov rax, dr0
    jmp snippet_end

code s_set_dr0
    mov dr0, rax
    jmp snippet_end

code s_lar                          # of EAX; RDX = ZF
    lar ecx, eax
    setz dl
    movzx edx, dl
    jmp snippet_end

code s_lsl
    lsl ecx, eax
    setz dl
    movzx edx, dl
    jmp snippet_end

code s_verr
    verr ax
    setz dl
    movzx edx, dl
    jmp snippet_end

code s_verw
    verw ax
    setz dl
    movzx edx, dl
    jmp snippet_end

code s_load_ds                      # with AX, and RAX = DS
    mov ds, eax
    mov eax, ds
    jmp snippet_end

code s_get_cs
    mov eax, cs
    mov edx, ss
    jmp snippet_end

code s_sysenter
    sysenter
    jmp snippet_end

code s_rdpkru
    xor ecx, ecx
    rdpkru
    jmp snippet_end

code s_wrpkru
    xor ecx, ecx
    xor edx, edx
    wrpkru
    jmp snippet_end

# Loads from [RDI] while the protection keys are EAX.
code s_load_with_keys
    xor ecx, ecx
    xor edx, edx
    wrpkru
    mov r8, [rdi]
    xor eax, eax
    wrpkru
    jmp snippet_end

    .purgem code

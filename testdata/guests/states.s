# A guest without a kernel saves its state through port A, changes its memory, and
# restores the state (docs/ports.md, raw I/O ports). The restored guest is told so by
# the event, and finds its memory as it was. Exit codes: 42 all is well, 43 the memory
# is not that of the state, 100 + kind another outcome than done.
#
# The host puts two requests into memory before the guest runs: for each a length (4
# bytes) and a frame, with the ids 1 (save) at SAVE and 2 (restore) at RESTORE.
#
# 32-bit protected mode, flat, loaded and entered at 0x1000.

	.set	A, 0x6a0		# port A: address, (high half), length, doorbell
	.set	B, 0x6b0		# port B: address, (high half), room, command
	.set	SAVE, 0x5000
	.set	RESTORE, 0x6000
	.set	event, 0x8000
	.set	memory, 0x100000	# what the state is told by
	.set	pages, 64

	.macro	out port, value
	movl	\value, %eax
	movl	$\port, %edx
	outl	%eax, %dx
	.endm

	.globl	_start
_start:
	movl	$1, %eax
	call	fill
	out	A, $SAVE+4
	out	A+8, SAVE
	out	A+12, $1

# Wait for an event. The saved guest waits here, too.
wait:	movl	$B+12, %edx
	inl	%dx, %eax
	testb	$1, %al
	jz	wait
	out	B, $event
	out	B+8, $0x8000
	out	B+12, $1
	movb	event+18, %al		# its kind
	cmpb	$2, %al
	jne	bad
	cmpl	$1, event+4		# the id of its request
	je	saved
	cmpl	$2, event+4
	jne	wait

# Restored: memory is what it was.
	movl	$memory, %esi
	movl	$pages, %ecx
1:	cmpl	$1, (%esi)
	jne	wrong
	addl	$4096, %esi
	loop	1b
	movb	$42, %al
	jmp	end

saved:	movl	$2, %eax
	call	fill
	out	A, $RESTORE+4
	out	A+8, RESTORE
	out	A+12, $1
	jmp	wait

wrong:	movb	$43, %al
	jmp	end
bad:	addb	$100, %al
end:	outb	%al, $0xf4
	jmp	end

# fill writes EAX to every page.
fill:	movl	$memory, %esi
	movl	$pages, %ecx
2:	movl	%eax, (%esi)
	addl	$4096, %esi
	loop	2b
	ret

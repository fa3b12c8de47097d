package main

import (
	"context"
	"slices"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/vmckpt/vmckpt/node-agent/qemu"
)

// What shells offer behind a command that is being typed.

// completeBound is how long a shell waits for names: a volume may hang.
const completeBound = 2 * time.Second

// completer names what may stand in the place of an argument. What cannot be found out is not offered, and is no error.
type completer func(ctx context.Context) []string

// complete has the shell offer what each argument may be; the last completer is that of all further ones if more says so.
func complete(c *cobra.Command, more bool, arguments ...completer) {
	c.ValidArgsFunction = func(c *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		n := len(args)
		if more {
			n = min(n, len(arguments)-1)
		}
		if n >= len(arguments) {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		names := slices.DeleteFunc(within(c.Context(), arguments[n]), func(name string) bool { return slices.Contains(args, name) })
		return names, cobra.ShellCompDirectiveNoFileComp
	}
}

// completeFlag has the shell offer what a flag may be.
func completeFlag(c *cobra.Command, flag string, values completer) {
	err := c.RegisterFlagCompletionFunc(flag, func(c *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
		return within(c.Context(), values), cobra.ShellCompDirectiveNoFileComp
	})
	if err != nil {
		panic(err) // there is no such flag
	}
}

// within is what a completer names in the time that a shell may wait.
func within(ctx context.Context, values completer) []string {
	if ctx == nil {
		ctx = context.Background()
	}
	ctx, cancel := context.WithTimeout(ctx, completeBound)
	defer cancel()
	named := make(chan []string, 1)
	go func() { named <- values(ctx) }()
	select {
	case names := <-named:
		// Others name images and machines; shells act upon line ends and tabs among what is offered.
		return slices.DeleteFunc(slices.Clone(names), func(name string) bool { return oneLine(name) != name })
	case <-ctx.Done():
		return nil
	}
}

// words are values that are always the same.
func words(all ...string) completer {
	return func(context.Context) []string { return all }
}

// imageNames are those of the repository that the flags and the environment name.
func (p *program) imageNames(ctx context.Context) []string {
	repository, err := p.open()
	if err != nil {
		return nil
	}
	defer repository.Close()
	summaries, err := repository.Images(ctx)
	if err != nil {
		return nil
	}
	var names []string
	for _, s := range summaries {
		names = append(names, s.Name)
	}
	return names
}

// machineNames are the names of the machines that run here.
func machineNames(ctx context.Context) []string {
	all, err := qemu.All(ctx)
	if err != nil {
		return nil
	}
	var names []string
	for _, m := range all {
		if m.Guest != "" {
			names = append(names, m.Guest)
		}
	}
	return names
}

// machinePIDs are those of the machines that run here.
func machinePIDs(ctx context.Context) []string {
	all, err := qemu.All(ctx)
	if err != nil {
		return nil
	}
	var pids []string
	for _, m := range all {
		pids = append(pids, strconv.Itoa(m.PID))
	}
	return pids
}

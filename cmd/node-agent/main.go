// Command node-agent is VMckpt's agent on a node: it takes the checkpoints and does the restores that are bound to the node.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/spf13/pflag"

	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	ctrlmanager "sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/metrics"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"

	vmckptv1 "github.com/vmckpt/vmckpt/api/v1alpha1"
	"github.com/vmckpt/vmckpt/cmd/internal/settings"
	"github.com/vmckpt/vmckpt/node-agent/agent"
	"github.com/vmckpt/vmckpt/node-agent/guard"
	"github.com/vmckpt/vmckpt/node-agent/inject"
	"github.com/vmckpt/vmckpt/node-agent/jobs"
	"github.com/vmckpt/vmckpt/node-agent/supervise"
)

func main() {
	// The workers, the leash's holder and the injection helper are this binary too.
	guard.Main()
	inject.Main()
	supervise.Main(jobs.All(), func(err error) string { return string(jobs.CodeOf(err)) })

	o, err := parseOptions(os.Args[1:], os.Getenv)
	if errors.Is(err, pflag.ErrHelp) {
		return
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "node-agent:", err)
		os.Exit(2)
	}
	if err := run(ctrl.SetupSignalHandler(), o); err != nil {
		fmt.Fprintln(os.Stderr, "node-agent:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, o *options) error {
	logger := o.Logger()
	ctrl.SetLogger(logger)
	probes, err := serveProbes(o.ProbeAddress)
	if err != nil {
		return err
	}
	defer probes.close()
	probes.waits("another agent is at work on this node, and is waited for to end")
	lock, err := agent.Lock(ctx, o.RunDir)
	if err != nil {
		return err
	}
	defer lock.Close()
	scheme, err := settings.Scheme()
	if err != nil {
		return err
	}
	config, err := o.Config()
	if err != nil {
		return err
	}
	// Only what is bound to this node is watched; all else is read when it is needed.
	mine := cache.ByObject{Field: fields.OneTermEqualSelector("status.nodeName", o.NodeName)}
	manager, err := ctrl.NewManager(config, ctrl.Options{
		Scheme:                  scheme,
		Logger:                  logger,
		Cache:                   cache.Options{ByObject: map[client.Object]cache.ByObject{&vmckptv1.VMCheckpoint{}: mine, &vmckptv1.VMRestore{}: mine}},
		Metrics:                 metricsserver.Options{BindAddress: o.MetricsAddress},
		GracefulShutdownTimeout: &o.GracePeriod,
	})
	if err != nil {
		return err
	}
	counted := agent.NewMetrics()
	for _, c := range counted.Collectors() {
		if err := metrics.Registry.Register(c); err != nil {
			return err
		}
	}
	_, err = agent.New(manager, agent.Options{
		NodeName: o.NodeName,
		Volumes:  agent.LocalVolumes{Reader: manager.GetAPIReader(), Root: o.HostRoot},
		Keys: &agent.KeyRing{
			Reader: manager.GetAPIReader(),
			Secret: types.NamespacedName{Namespace: o.Namespace, Name: o.KeysSecret},
			Dir:    o.RunDir + "/keys",
		},
		NotesDir:  o.RunDir + "/notes",
		RecordDir: o.RecordDir,
		Witness:   o.Witness,
		Slots:     o.Slots,
		Metrics:   counted,

		OtherNamespaces: o.OtherNamespaces,
	})
	if err != nil {
		return err
	}
	if err := manager.Add(ctrlmanager.RunnableFunc(probes.ready)); err != nil {
		return err
	}
	logger.Info("the node agent begins", "node", o.NodeName, "slots", o.Slots)
	return manager.Start(ctx)
}

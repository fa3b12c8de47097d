// Command manager runs VMckpt's controllers: they check what is asked for and bind it to nodes.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/spf13/pflag"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/utils/clock"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/healthz"
	"sigs.k8s.io/controller-runtime/pkg/metrics"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"

	"github.com/vmckpt/vmckpt/cmd/internal/settings"
	"github.com/vmckpt/vmckpt/controllers/cached"
	"github.com/vmckpt/vmckpt/controllers/checkpoint"
	"github.com/vmckpt/vmckpt/controllers/keys"
	"github.com/vmckpt/vmckpt/controllers/restore"
	"github.com/vmckpt/vmckpt/controllers/totals"
)

// options are the manager's settings.
type options struct {
	settings.Common
	LeaderElection bool
	LeaseDuration  time.Duration
}

func parseOptions(args []string, getenv func(string) string) (*options, error) {
	o := &options{}
	flags := pflag.NewFlagSet("manager", pflag.ContinueOnError)
	flags.BoolVar(&o.LeaderElection, "leader-elect", true, "of several managers let one work at a time")
	flags.DurationVar(&o.LeaseDuration, "leader-elect-lease-duration", 15*time.Second, "how long a manager that died is waited for before another takes over")
	o.AddTo(flags, getenv)
	if err := o.Parse(flags, args); err != nil {
		return nil, err
	}
	if o.LeaseDuration < time.Second {
		return nil, fmt.Errorf("a lease of %v: want a second at the least", o.LeaseDuration)
	}
	return o, nil
}

func main() {
	o, err := parseOptions(os.Args[1:], os.Getenv)
	if errors.Is(err, pflag.ErrHelp) {
		return
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "manager:", err)
		os.Exit(2)
	}
	if err := run(ctrl.SetupSignalHandler(), o); err != nil {
		fmt.Fprintln(os.Stderr, "manager:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, o *options) error {
	logger := o.Logger()
	ctrl.SetLogger(logger)
	scheme, err := settings.Scheme()
	if err != nil {
		return err
	}
	config, err := o.Config()
	if err != nil {
		return err
	}
	// In client-go's proportions: renewed for two thirds of the lease, tried every seventh of it.
	renew, retry := o.LeaseDuration*2/3, o.LeaseDuration*2/15
	manager, err := ctrl.NewManager(config, ctrl.Options{
		Scheme: scheme,
		Logger: logger,
		Cache:  cached.Options(),
		// Of Secrets there is one to be looked at: none is watched.
		Client:                        client.Options{Cache: &client.CacheOptions{DisableFor: []client.Object{&corev1.Secret{}}}},
		Metrics:                       metricsserver.Options{BindAddress: o.MetricsAddress},
		HealthProbeBindAddress:        o.ProbeAddress,
		GracefulShutdownTimeout:       &o.GracePeriod,
		LeaderElection:                o.LeaderElection,
		LeaderElectionID:              "manager.vmckpt.io",
		LeaderElectionNamespace:       o.Namespace,
		LeaderElectionReleaseOnCancel: true,
		LeaseDuration:                 &o.LeaseDuration,
		RenewDeadline:                 &renew,
		RetryPeriod:                   &retry,
	})
	if err != nil {
		return err
	}
	waits := checkpoint.NewWaits()
	if err := metrics.Registry.Register(waits); err != nil {
		return err
	}
	checkpoints := &checkpoint.Reconciler{
		Client: manager.GetClient(), Live: manager.GetAPIReader(), Events: manager.GetEventRecorder("vmckpt"), Clock: clock.RealClock{}, Waits: waits,
	}
	if err := checkpoints.SetupWithManager(ctx, manager); err != nil {
		return err
	}
	restores := &restore.Reconciler{Client: manager.GetClient(), Live: manager.GetAPIReader(), Events: manager.GetEventRecorder("vmckpt"), Clock: clock.RealClock{}}
	if err := restores.SetupWithManager(ctx, manager); err != nil {
		return err
	}
	if err := manager.Add(&keys.Maker{Client: manager.GetClient(), Clock: clock.RealClock{}, Namespace: o.Namespace, Name: o.KeysSecret}); err != nil {
		return err
	}
	if err := manager.Add(&totals.Collector{Reader: manager.GetClient(), Registry: metrics.Registry}); err != nil {
		return err
	}
	if err := manager.AddHealthzCheck("ping", healthz.Ping); err != nil {
		return err
	}
	if err := manager.AddReadyzCheck("cache", synced(manager.GetCache(), logger)); err != nil {
		return err
	}
	logger.Info("the manager begins", "namespace", o.Namespace)
	return manager.Start(ctx)
}
